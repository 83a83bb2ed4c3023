"""Projects of a user's own: a folder with a task.py, and the settings of a command given there."""

from pathlib import Path
from textwrap import dedent

from flapp.config.load import compose, expand_words, project_words
from flapp.config.schema import Config
from tools.new import make

EDITED = '''

def focal(outputs, targets):
    """The focal loss (Lin et al. 2017) with gamma = 2."""
    logs = F.log_softmax(outputs, 1).gather(1, targets[:, None])
    return (-((1 - logs.exp()) ** 2) * logs).mean()


def build_other():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.Linear(32, 10)
    )
'''
EDITED_WORDS = "model.target=task:build_other model.kwargs={} train.loss=task:focal dataset.augment=false"
BERT = '''
import numpy as np
from transformers import DistilBertConfig, DistilBertForSequenceClassification

def build_model():
    """Return a small DistilBERT for token ids."""
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=12)
    )

def make_data():
    draw = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 64), ("test", 32)):
        tokens = draw.integers(2, 50, (count, 12))
        labels = draw.integers(0, 2, count)
        tokens[labels == 1, 0] = 1
        splits[split] = (tokens, labels)
    return splits, ["other", "greeting"]
'''
BERT_WORDS = (
    "model.target=bert:build_model model.kwargs={} lora=default strategy=fedlora lora.targets=[q_lin,v_lin] "
    "dataset=custom dataset.name=greetings dataset.shape=[12] dataset.classes=2 dataset.target=bert:make_data "
    "dataset.augment=false train.loss=null evaluate.metrics=null evaluate.scores=null"
)
SLOW = """
import os
import time
from pathlib import Path
from torch.nn import functional as F

def loss(outputs, targets):
    if "FLWR_HOME" in os.environ:  # in a client process of Flower's
        begun = Path(os.environ["FLWR_HOME"], f"begun-{os.getpid()}")
        if not begun.exists():
            begun.touch()
        time.sleep(0.2)  # so that a round is long and costs nothing
    return F.mse_loss(outputs.flatten(), targets)
"""


def new_project(folder: Path, template: str) -> Path:
    """Make a project and return its folder."""
    make(folder, template)
    return folder


def settings_in(folder: Path, home: Path, *words: str) -> Config:
    """Return the settings of `flapp run WORDS` in a folder."""
    given = expand_words([f"home={home}", *words])
    return compose([*project_words(folder, given), *given], folder)


def write_task(folder: Path, text: str) -> Path:
    """Write the task.py of a folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text(dedent(text))
    return folder


def add_to_task(folder: Path, text: str) -> None:
    """Append to the task.py of a folder."""
    with (folder / "task.py").open("a") as file:
        file.write(f"\n{dedent(text)}")
