"""Client mods: what wraps every message that a client handles."""

import traceback
from logging import ERROR

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import log
from flwr.common.constant import ErrorCode


def name_errors_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer with the fault in one line when handling a message raises.

    Flower would answer with a whole traceback; that goes to the client's own log.
    """
    try:
        return call_next(message, context)
    except Exception as error:  # noqa: BLE001 - the boundary of a client: no message may end its process
        log(ERROR, traceback.format_exc())
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return Message(Error(code=code, reason=describe(error)), reply_to=message)


def describe(error: Exception) -> str:
    """Say an error in one line, with its type where the text was not written for people."""
    text = " ".join(str(error).split())
    plain = isinstance(error, ValueError | FloatingPointError) and text
    return text if plain else f"{type(error).__name__}: {text}"
