"""ViTs that torchvision, transformers and timm have written give the same logits here, or are refused by name."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models
import transformers
from torch import nn

from flapp.data.artifact import NORMALIZATIONS as OURS
from flapp.model.adapter_files import export_merged
from flapp.model.build import build_model
from flapp.model.files import save_tensors, shapes_of
from flapp.model.layout import Variant
from flapp.model.lora import add_lora, layout_of
from flapp.model.pretrained import check_pretrained, load_pretrained
from flapp.model.vit_weights import NETWORKS, NORMALIZATIONS, describe, describe_shapes
from flapp.model.weight_files import read_state
from tests.support.refusals import refused
from tests.support.vits import SIZES, Theirs, draw, edit, images, timms, torchvisions, transformerses, vit_model

WRITTEN: dict[str, tuple[Callable[[Path], Theirs], str, str, Variant, str | None]] = {
    # how it is written, what is read of it, its library, what it says
    "torchvision.pth": (torchvisions, "", "torchvision", Variant(pooling="token"), None),
    "transformers": (transformerses, "", "transformers", Variant(1e-12, "gelu", "token"), "half"),
    "transformers/": (transformerses, "model.safetensors", "transformers", Variant(1e-12, "gelu", "token"), "half"),
    "quick": (
        lambda path: transformerses(path, hidden_act="quick_gelu", layer_norm_eps=0.1),
        *("", "transformers", Variant(0.1, "quick_gelu", "token"), "half"),
    ),
    "timm": (timms, "", "timm", Variant(pooling="token"), "half"),
    "timm.safetensors": (timms, "", "timm", Variant(pooling="token"), None),
    "mean": (lambda path: timms(path, global_pool="avg"), "", "timm", Variant(pooling="mean"), "half"),
    "mean.safetensors": (lambda path: timms(path, global_pool="avg"), "", "timm", Variant(pooling="mean"), None),
    "normed": (lambda path: timms(path, fc_norm=True), "", "timm", Variant(pooling="token"), "half"),
    "deit": (lambda path: timms(path, name="deit_tiny_patch16_224"), "", "timm", Variant(pooling="token"), "imagenet"),
}


PLAIN = Variant()


def ours(classes: int = 5, variant: Variant = PLAIN) -> nn.Module:
    torch.manual_seed(2)
    return build_model("vit_ti_16", (32, 32, 3), classes, variant=variant).eval()


def loaded(path: Path, variant: Variant) -> nn.Module:
    model = ours(variant=variant)
    check_pretrained(layout_of(model), path)
    assert load_pretrained(model, path).head_loaded
    return model


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_vit_of_another_library_gives_its_logits(kind: str, tmp_path: Path) -> None:
    write, part, library, variant, normalization = WRITTEN[kind]
    theirs, path = write(tmp_path / kind.strip("/")), tmp_path / kind.strip("/") / part
    found = describe(path)
    assert (found.library, found.size, found.image_size, found.channels) == (library, "vit_ti_16", 32, 3)
    assert (found.variant, found.normalization) == (variant, normalization)
    with torch.no_grad():
        torch.testing.assert_close(loaded(path, variant)(images()), theirs(images()), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_head_of_other_classes_or_none_stays_as_the_seed_made_it(tmp_path: Path) -> None:
    transformerses(tmp_path / "seven", classes=7)
    vit_model(tmp_path / "model")
    timms(tmp_path / "timm", classes=0)
    for name, lost in (("seven", 0), ("model", 2), ("timm", 0)):
        model = ours(variant=Variant() if name == "timm" else Variant(1e-12))
        assert check_pretrained(layout_of(model), tmp_path / name) is not None
        found = load_pretrained(model, tmp_path / name)
        assert not found.head_loaded
        assert (found.left_out == ("vit.pooler.dense.bias", "vit.pooler.dense.weight")) == (lost == 2)
        assert torch.equal(model.heads.head.weight, ours().heads.head.weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.slow
def test_a_model_that_differs_from_what_its_weights_say_is_refused_with_the_setting(tmp_path: Path) -> None:
    transformerses(tmp_path / "tf", hidden_act="quick_gelu")
    timms(tmp_path / "mean", global_pool="avg")
    timms(tmp_path / "token")
    model, quick = ours(), Variant(1e-12, "quick_gelu")
    for name, variant, fix in (
        ("tf", Variant(), r"layer_norm_eps=1e-12, this one has 1e-06: set model.layer_norm_eps=1e-12$"),
        ("tf", Variant(1e-12), "activation=quick_gelu, this one has gelu: set model.activation=quick_gelu"),
        ("tf", replace(quick, pooling="mean"), "pooling=token, this one has mean: set model.pooling=token"),
        ("mean", Variant(), "pooling=mean, this one has token: set model.pooling=mean"),
        ("mean", Variant(pooling="token"), "set model.pooling=mean"),
        ("token", Variant(pooling="mean"), "set model.pooling=token"),
    ):
        model.set_variant(variant)  # type: ignore[operator]
        with pytest.raises(ValueError, match=fix):
            check_pretrained(layout_of(model), tmp_path / name)
        with pytest.raises(ValueError, match=fix):
            load_pretrained(model, tmp_path / name)
    load_pretrained(ours(variant=quick), tmp_path / "tf")
    other = ours(classes=7)
    with pytest.raises(ValueError, match="set model.pooling=mean"):
        load_pretrained(other, tmp_path / "mean")
    for name, pooling in (("mean", "token"), ("token", "mean")):  # but a head that is new may see what is asked for
        other.set_variant(Variant(pooling=pooling))  # type: ignore[operator]
        load_pretrained(other, tmp_path / name)


def test_weights_of_another_size_name_the_model_to_choose(tmp_path: Path) -> None:
    timms(tmp_path / "timm.safetensors")
    with torch.device("meta"):
        wide = layout_of(build_model("vit_b_16", (32, 32, 3), 5))
    with pytest.raises(ValueError, match="has the weights of vit_ti_16, the model is vit_b_16: set model=vit_ti_16"):
        check_pretrained(wide, tmp_path / "timm.safetensors")


def said_of(found: dict[str, tuple[int, ...]]) -> str:
    with refused(ValueError) as caught:
        describe_shapes(Path("/nowhere/x.safetensors"), found)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("resnet18", {}, "looks like ResNet"),
        ("swin_tiny_patch4_window7_224", {}, "looks like Swin"),
        ("convnext_atto", {}, "looks like ConvNeXt"),
        ("mixer_s16_224", {}, "looks like MLP-Mixer"),
        ("beit_base_patch16_224", {}, "looks like BEiT or EVA"),
        ("vit_small_patch14_dinov2", {}, "layer scale, as DINOv2"),
        ("vit_small_patch16_dinov3", {}, "register tokens"),
        ("deit_tiny_distilled_patch16_224", {}, "looks like DeiT with a distillation token"),
        ("deit3_small_patch16_224", {}, "layer scale"),
        ("vit_base_patch16_clip_224", {}, "norm_pre"),
        ("vit_base_patch16_siglip_224", {}, "attention pooling"),
        ("vit_base_patch16_gap_224", {}, "has no class token"),
        ("vit_base_patch16_224_miil", {}, "qkv_bias=False"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "register tokens"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "qk_norm"),
        ("vit_tiny_patch16_224", {"init_values": 1e-5}, "layer scale"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, "no_embed_class=True"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "more norms"),
    ],
)
def test_timms_other_networks_are_refused_by_name(name: str, changed: dict[str, Any], said: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **changed)
    assert said in said_of(shapes_of(model.state_dict()))


TORCHVISIONS = {
    "resnet18": "looks like ResNet",
    "swin_t": "looks like Swin",
    "convnext_tiny": "looks like ConvNeXt",
    "efficientnet_b0": "looks like EfficientNet or MobileNet",
    "vgg11": "looks like VGG or AlexNet",
    "densenet121": "looks like DenseNet",
    "vit_b_32": "a ViT of patch 32, 12 layers, width 768",
    "vit_l_16": "a ViT of patch 16, 24 layers, width 1024",
}


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_torchvisions_other_networks_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        found = shapes_of(getattr(torchvision.models, name)().state_dict())
    assert TORCHVISIONS[name] in said_of(found)
    if name.startswith("vit"):
        assert "a layer before the head (pre_logits)" in said_of(found | {"heads.pre_logits.weight": (8, 8)})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a folder of transformers' and one of timm's."""
    path = tmp_path_factory.mktemp("vits")
    transformerses(path / "transformers")
    timms(path / "timm")
    return path


def copy_of(source: Path, target: Path) -> Path:
    """Return a copy of a folder whose files of JSON a test may change; weights are linked."""
    target.mkdir()
    for path in source.iterdir():
        (shutil.copy if path.suffix == ".json" else os.link)(path, target / path.name)
    return target


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Return a folder of transformers'."""
    return copy_of(written / "transformers", tmp_path / "vit")


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
OTHERS = {
    "Dinov2ForImageClassification": ("dinov2", "DINOv2", SMALL),
    "DINOv3ViTModel": ("dinov3_vit", "DINOv3", SMALL),
    "DeiTForImageClassification": ("deit", "DeiT with a distillation token", SMALL),
    "BeitForImageClassification": ("beit", "BEiT or EVA", SMALL),
    "SwinForImageClassification": ("swin", "Swin", {"embed_dim": 16, "depths": [1], "num_heads": [1]}),
    "ConvNextForImageClassification": ("convnext", "ConvNeXt", {"hidden_sizes": [8], "depths": [1], "num_stages": 1}),
    "ResNetForImageClassification": ("resnet", "ResNet", {"hidden_sizes": [8], "depths": [1], "embedding_size": 8}),
    "CLIPVisionModel": ("clip_vision_model", "CLIP or SigLIP", SMALL),
    "ViTMSNModel": ("vit_msn", "", SMALL),
}


@pytest.mark.parametrize("name", OTHERS)
def test_transformers_other_networks_are_refused_by_name(name: str, tmp_path: Path) -> None:
    kind, network, sizes = OTHERS[name]
    transformers_class = getattr(transformers, name)
    transformers_class(transformers_class.config_class(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"config.json beside it says model_type {kind}, .*{name}"):
        describe(tmp_path)
    (tmp_path / "config.json").unlink()
    said = f"looks like {network}" if network else "no config.json beside it"
    with pytest.raises(ValueError, match=said):
        describe(tmp_path)
    assert not network or network in NETWORKS.values()


def test_a_vit_for_masked_images_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SIZES, image_size=32)
    transformers.ViTForMaskedImageModeling(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a mask token or decoder"):
        describe(tmp_path)


TRANSFORMERS: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 6}, "says that the ViT has 6 heads: flapp's of this width have 3"),
    ({"num_attention_heads": None}, "says that the ViT has 12 heads"),
    ({"num_attention_heads": [3]}, r"has \[3\] heads"),
    ({"hidden_act": "gelu_new"}, "says hidden_act=gelu_new: flapp's ViTs have gelu or quick_gelu"),
    ({"hidden_act": ["gelu"]}, "says hidden_act="),
    ({"layer_norm_eps": "x"}, "says layer_norm_eps='x' is no epsilon"),
    ({"layer_norm_eps": float("nan")}, "says layer_norm_eps=nan"),
    ({"layer_norm_eps": 0}, "says layer_norm_eps=0.0"),
    ({"image_size": [16, 64]}, r"says images of \[16, 64\] pixels: flapp's ViTs take square images only"),
    ({"image_size": 64}, "says images of 64 pixels, and the position embeddings are for 32"),
    ({"image_size": "32"}, "says images of 32 pixels, and the position"),
    ({"model_type": None}, "does not say model_type vit"),
    ({"model_type": {"a": "\n"}}, "config.json beside it says model_type"),
    ({"model_type": "x" * 10_000}, "config.json beside it says model_type xxx"),
]
TIMMS: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "vit_base_patch16_rpn_224"}, "architecture=vit_base_patch16_rpn_224, which is no ViT"),
    ({"architecture": 3}, "architecture=3"),
    ({"model_args": [3]}, "which is no ViT"),
    ({"model_args": {"num_heads": 6}}, "has 6 heads: flapp's of this width have 3"),
    ({"model_args": {"act_layer": "quick_gelu"}}, "says act_layer=quick_gelu, which flapp's ViTs cannot be"),
    ({"model_args": {"norm_layer": "rmsnorm"}}, "says norm_layer=rmsnorm"),
    ({"model_args": {"pool_include_prefix": True}}, "says pool_include_prefix=True"),
    ({"global_pool": "avg", "model_args": {}}, "says global_pool=avg: flapp's heads see"),
    ({"global_pool": "map", "model_args": {}}, "says global_pool=map"),
    ({"model_args": {"img_size": [16, 64]}}, r"says images of \[16, 64\] pixels: flapp's ViTs take square"),
    ({"model_args": {"img_size": 64}}, "says images of 64 pixels, and the position embeddings are for 32"),
    ({"model_args": {}, "pretrained_cfg": {"input_size": [3, 16, 64]}}, r"says images of \[16, 64\] pixels: flapp"),
    ({"pretrained_cfg": 3}, "a damaged pretrained_cfg"),
    ({"pretrained_cfg": {"mean": [0.4], "std": [0.2]}}, "flapp scales them by"),
]
CONFIGS = [*(("transformers", *row) for row in TRANSFORMERS), *(("timm", *row) for row in TIMMS)]


@pytest.mark.parametrize(("library", "changed", "said"), CONFIGS, ids=str)
def test_a_config_that_our_vit_cannot_represent_is_refused(
    written: Path, tmp_path: Path, library: str, changed: dict[str, Any], said: str
) -> None:
    folder = copy_of(written / library, tmp_path / "vit")
    edit(folder / "config.json", **changed)
    with refused(ValueError, said, longest=1000):
        describe(folder)


def test_a_config_that_is_no_object_or_hostile_gives_a_one_line_error(folder: Path) -> None:
    for text in (b"[]", b"3", b"", b"\xff", b"{", b"[" * 100_000, b'{"a": ' * 200 + b"1" + b"}" * 200):
        (folder / "config.json").write_bytes(text)
        with refused(ValueError, r"config.json (cannot be read|holds \w+, not settings)"):
            describe(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"image_mean": [0.4] * 3, "image_std": [0.27, 0.26, 0.28]}, "scales them by none, half, imagenet only"),
        ({"image_mean": "half"}, "damaged mean"),
        ({"image_mean": [[1]]}, "damaged mean"),
        ({"image_mean": {"a": 1}}, "damaged mean"),
        ({"do_rescale": False}, "does not scale pixels by 1/255"),
        ({"rescale_factor": 1}, "does not scale pixels by 1/255"),
    ],
    ids=str,
)
def test_images_prepared_in_another_way_are_refused(folder: Path, changed: dict[str, Any], said: str) -> None:
    path = folder / "preprocessor_config.json"
    edit(path, **changed)
    with pytest.raises(ValueError, match=said):
        describe(folder)
    edit(path, do_rescale=True, rescale_factor=1 / 255, do_normalize=False)
    assert describe(folder).normalization == "none"


def test_both_norms_of_timm_and_pools_other_than_the_mean_are_refused(tmp_path: Path) -> None:
    timms(tmp_path / "max", global_pool="avgmax")
    with pytest.raises(ValueError, match="says global_pool=avgmax"):
        describe(tmp_path / "max")
    state = ours().state_dict()
    save_tensors(state, tmp_path / "ours.safetensors")
    timms(tmp_path / "timm.pth")
    both = read_state(tmp_path / "timm.pth") | {"fc_norm.weight": torch.ones(192), "fc_norm.bias": torch.zeros(192)}
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(ValueError, match="2 not the model's, first fc_norm.weight"):
        load_pretrained(ours(), tmp_path / "both.pth")


def test_weights_in_several_files_are_refused_with_the_way_to_write_one(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SIZES, image_size=32)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path, max_shard_size="5MB")
    with pytest.raises(ValueError, match=r"in several files \(model.safetensors.index.json\): write them as one"):
        load_pretrained(ours(), tmp_path)


def test_our_own_weights_say_their_variant_in_their_header(tmp_path: Path) -> None:
    variant, path = Variant(1e-12, "quick_gelu", "mean"), tmp_path / "model.safetensors"
    saved = draw(ours(variant=variant))
    save_tensors(saved.state_dict(), path, model="vit_ti_16", **variant.given())
    assert describe(tmp_path).variant == variant
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path, variant)(images()), saved(images()))
    save_tensors(saved.state_dict(), path, layer_norm_eps="x")
    with pytest.raises(ValueError, match="has a damaged header"):
        describe(tmp_path)


def test_a_variant_changes_neither_what_is_drawn_nor_the_tensors() -> None:
    plain, other = ours(), ours(variant=Variant(1e-12, "quick_gelu", "mean"))
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in plain.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(plain(images()), other(images()))
    with pytest.raises(ValueError, match="model.pooling=mean is for a ViT, got model=cnn: leave it out"):
        build_model("cnn", (8, 8, 1), 5, variant=Variant(pooling="mean"))


def test_normalizations_are_those_of_the_data() -> None:
    assert {name: values for values, name in NORMALIZATIONS.items()} == OURS


def test_a_merged_model_keeps_its_epsilon_and_torchvision_has_no_other_variant(tmp_path: Path) -> None:
    model, mean = ours(variant=Variant(1e-12)), ours(variant=Variant(pooling="mean"))
    add_lora(model, 2, 4.0)
    export_merged(model, tmp_path / "vit.safetensors")
    found = describe(tmp_path / "vit.safetensors")
    assert (found.library, found.variant) == ("torchvision", Variant(1e-12, pooling="token"))
    with pytest.raises(ValueError, match="torchvision's ViT has no pooling=mean"):
        export_merged(mean, tmp_path / "vit.safetensors")
