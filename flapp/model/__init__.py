"""Models, and safetensors files of them; knows neither Flower, Hydra nor data."""

from flapp.model.build import BUILDERS, build_model
from flapp.model.files import load_tensors, save_tensors, sha256_of_file

__all__ = ["BUILDERS", "build_model", "load_tensors", "save_tensors", "sha256_of_file"]
