"""Write the configuration of an nginx proxy that forwards only the calls of SuperNodes to a SuperLink.

    python -m tools.proxy /etc/flapp --listen 0.0.0.0:8000 --superlink 9000
    nginx -c /etc/flapp/nginx.conf

A SuperLink serves all its APIs at one port, and only the Fleet API, which SuperNodes use, authenticates the caller.
Anyone who can reach the Control API can submit apps, stop runs, and register and unregister SuperNodes. So the
SuperLink listens only on the loopback address of its machine, and nginx forwards only the calls of the Fleet API.

The folder must contain ca.crt, server.crt and server.key, which `tools.certificates server` makes. nginx presents
server.crt to the sites. It checks that the SuperLink's certificate is for localhost and signed by ca.crt. nginx.conf
and a folder nginx/ for temporary files are created in the same folder. nginx does not need root: let the user who owns
the keys run it.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from cryptography import x509

from flapp.files import write_text
from tools.cli import errors_in_one_line, new_parser

TEMPLATE = Path(__file__).with_name("nginx.conf")
CALLS = (  # all of Flower's Fleet API but register-node and unregister-node, which authenticated SuperNodes never use
    *("activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab"),
    *("pull-messages", "push-messages", "pull-object", "push-object", "confirm-message-received"),
)
NEEDED = ("ca.crt", "server.crt", "server.key")


def write_proxy_files(folder: Path, listen: str, superlink: int) -> Path:
    """Write nginx.conf and the folder for temporary files into `folder`; return the path of nginx.conf.

    listen: the address:port that sites reach; superlink: the SuperLink's port on 127.0.0.1. Raises ValueError when
    nginx could not use `listen`, the path of `folder` or the certificates in it.
    """
    fix = f"python -m tools.certificates server {folder} --host NAME"
    for name in NEEDED:
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing: {fix}")
    certificate = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if "localhost" not in names.get_values_for_type(x509.DNSName):
        raise ValueError(f"{folder}/server.crt is not for localhost, where nginx reaches the SuperLink: {fix}")
    if not re.fullmatch(r"[\w.:\[\]-]+:\d+", listen):
        raise ValueError(f"--listen {listen} is not an address: give HOST:PORT")
    if not re.fullmatch(r"[\w./-]+", str(folder)):
        raise ValueError(f"{folder} has characters that are special in nginx.conf: use a folder with a plain name")
    run = folder / "nginx"
    run.mkdir(exist_ok=True)
    values = {"folder": folder, "run": run, "listen": listen, "superlink": superlink, "calls": "|".join(CALLS)}
    path = folder / "nginx.conf"
    write_text(path, Template(TEMPLATE.read_text()).substitute(values))
    return path


@errors_in_one_line(OSError, ValueError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files and print the path of nginx.conf."""
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path, help="with ca.crt, server.crt and server.key")
    parser.add_argument("--listen", default="0.0.0.0:8000", help="where sites connect; default: %(default)s")
    parser.add_argument("--superlink", type=int, default=9000, help="its port on 127.0.0.1; default: %(default)s")
    given = parser.parse_args(arguments)
    print(write_proxy_files(given.folder.resolve(), given.listen, given.superlink))


if __name__ == "__main__":
    sys.exit(main())
