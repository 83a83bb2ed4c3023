"""Models, their adapters and the files of both; knows neither Flower, Hydra nor data.

The names below are for users' own code. flapp imports from the modules.
"""

from flapp import lazy_names

# Imported when asked for: checking settings needs no PyTorch, whose import takes more than a second.
_HOMES = {
    "ModelFactory": "split.factory",
    "ModelType": "split.component",
    "SplitModel": "split.component",
    "StorageManager": "split.files",
    "add_lora": "lora",
    "build_model": "build",
    "export_adapter": "adapter_files",
    "export_merged": "adapter_files",
    "import_adapter": "adapter_files",
    "load_pretrained": "pretrained",
    "load_tensors": "files",
    "save_tensors": "files",
}

__getattr__ = lazy_names(__name__, _HOMES)
