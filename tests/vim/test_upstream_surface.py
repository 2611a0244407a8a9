"""A network written against the packages as other people's code is: their import paths, calls and signatures."""

import importlib
import math
import pkgutil
from functools import partial

import pytest
import torch
from torch import nn

# What published model files import, by module. A name that is missing here breaks somebody's unchanged script.
SURFACE = {
    "causal_conv1d": ["causal_conv1d_fn", "causal_conv1d_update", "__version__"],
    "mamba_ssm": ["selective_scan_fn", "mamba_inner_fn", "Mamba", "MambaLMHeadModel", "__version__"],
    "mamba_ssm.ops.selective_scan_interface": [
        "SelectiveScanFn",
        "selective_scan_fn",
        "selective_scan_ref",
        "MambaInnerFn",
        "MambaInnerFnNoOutProj",
        "BiMambaInnerFn",
        "mamba_inner_fn",
        "mamba_inner_fn_no_out_proj",
        "bimamba_inner_fn",
        "mamba_inner_ref",
        "bimamba_inner_ref",
    ],
    "mamba_ssm.ops.triton.layer_norm": ["RMSNorm", "layer_norm_fn", "rms_norm_fn"],
    "mamba_ssm.ops.triton.layernorm": ["RMSNorm", "layer_norm_fn", "rms_norm_fn"],
    "mamba_ssm.ops.triton.selective_state_update": ["selective_state_update", "selective_state_update_ref"],
    "mamba_ssm.modules.mamba_simple": ["Mamba", "Block"],
    "mamba_ssm.models.config_mamba": ["MambaConfig"],
    "mamba_ssm.models.mixer_seq_simple": ["MixerModel", "MambaLMHeadModel", "create_block", "_init_weights"],
    "mamba_ssm.utils.generation": ["GenerationMixin", "InferenceParams"],
    "mamba_ssm.utils.hf": ["load_config_hf", "load_state_dict_hf"],
    "models_mamba": [
        "VisionMamba",
        "PatchEmbed",
        "Block",
        "create_block",
        "segm_init_weights",
        "RMSNorm",
        "layer_norm_fn",
        "rms_norm_fn",
        "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
        "vim_tiny_patch16_224",
    ],
    "rope": ["broadcat", "rotate_half", "VisionRotaryEmbedding", "VisionRotaryEmbeddingFast"],
    "timm.models.vision_transformer": ["VisionTransformer", "_cfg", "_load_weights"],
}


@pytest.mark.parametrize(("module", "names"), SURFACE.items())
def test_names_are_there(module, names):
    found = importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []


@pytest.mark.parametrize("name", ["models_mamba", "rope", "causal_conv1d", "mamba_ssm"])
def test_everything_that_is_exported_exists(name):
    module = importlib.import_module(name)
    assert [entry for entry in getattr(module, "__all__", []) if not hasattr(module, entry)] == []
    scope: dict[str, object] = {}
    exec(f"from {name} import *", scope)
    assert len(scope) > 1


def test_every_module_of_the_packages_imports():
    for name in ("causal_conv1d", "mamba_ssm"):
        package = importlib.import_module(name)
        for entry in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not entry.name.endswith("__main__"):
                importlib.import_module(entry.name)


def own_network(norm_module, bimamba_type, prenorm_in_fp32):
    """Another project's network: its own patch embedding, block and loop, on the packages' mixers and norms."""
    norms = importlib.import_module(norm_module)
    mixers = importlib.import_module("mamba_ssm.modules.mamba_simple")

    class Layer(nn.Module):
        def __init__(self, index):
            super().__init__()
            make = partial(mixers.Mamba, d_state=4, layer_idx=index, bimamba_type=bimamba_type, if_divide_out=True)
            self.mixer = make(12)
            self.norm = norms.RMSNorm(12, eps=1e-5)

        def forward(self, hidden, residual):
            hidden, residual = norms.rms_norm_fn(
                hidden,
                self.norm.weight,
                self.norm.bias,
                residual=residual,
                prenorm=True,
                residual_in_fp32=prenorm_in_fp32,
                eps=self.norm.eps,
            )
            return self.mixer(hidden, inference_params=None), residual

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 4, 4)
            self.layers = nn.ModuleList(Layer(i) for i in range(2))
            self.norm = nn.LayerNorm(12)

        def forward(self, x):
            hidden, residual = self.stem(x).flatten(2).transpose(1, 2), None
            for layer in self.layers:
                hidden, residual = layer(hidden, residual)
            return norms.layer_norm_fn(
                hidden, self.norm.weight, self.norm.bias, eps=self.norm.eps, residual=residual, prenorm=False
            ).mean(1)

    return Network()


@pytest.mark.parametrize("prenorm_in_fp32", [False, True])
@pytest.mark.parametrize("bimamba_type", ["none", "v1", "v2"])
@pytest.mark.parametrize("norm_module", ["mamba_ssm.ops.triton.layer_norm", "mamba_ssm.ops.triton.layernorm"])
def test_a_network_of_somebody_else_trains(norm_module, bimamba_type, prenorm_in_fp32):
    network = own_network(norm_module, bimamba_type, prenorm_in_fp32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    x, target = torch.randn(2, 3, 16, 16), torch.randn(2, 12)
    losses = []
    for _ in range(5):
        loss = (network(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rms_norm", [False, True])
def test_blocks_in_somebody_elses_loop(rms_norm, fused):
    from models_mamba import Block, RMSNorm, create_block, layer_norm_fn, rms_norm_fn

    layers = nn.ModuleList(
        create_block(
            12,
            4,
            ssm_cfg={"d_conv": 3},
            norm_epsilon=1e-5,
            drop_path=0.1 * i,
            rms_norm=rms_norm,
            residual_in_fp32=True,
            fused_add_norm=fused,
            layer_idx=i,
            bimamba_type="v2",
            if_divide_out=True,
            init_layer_scale=0.5,
        )
        for i in range(3)
    )
    assert all(isinstance(layer, Block) for layer in layers)
    assert [layer.layer_idx for layer in layers] == [0, 1, 2]
    assert [name for name, _ in layers[1].named_children()] == ["mixer", "norm", "drop_path"]
    norm = RMSNorm(12) if rms_norm else nn.LayerNorm(12)
    hidden, residual = torch.randn(2, 7, 12), None
    for layer in layers:
        hidden, residual = layer(hidden, residual, inference_params=None)
    out = (rms_norm_fn if rms_norm else layer_norm_fn)(
        hidden, norm.weight, norm.bias, eps=norm.eps, residual=residual, prenorm=False, residual_in_fp32=True
    )
    assert out.shape == (2, 7, 12)
    out.square().sum().backward()
    for name, parameter in layers.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_backbone_of_a_detector():
    """A subclass that throws the head, the final norm and the class token away and walks the layers itself."""
    from models_mamba import VisionMamba

    class Backbone(VisionMamba):
        def __init__(self, img_size, **options):
            super().__init__(img_size, 8, 8, depth=2, embed_dim=16, channels=3, num_classes=80, **options)
            del self.head, self.norm_f, self.cls_token
            self.pos_embed = nn.Parameter(self.pos_embed[:, 1:].detach())

        def forward_features(self, x):
            x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
            residual = None
            for layer in self.layers:
                x = self.rope(x)
                if residual is not None and self.if_rope_residual:
                    residual = self.rope(residual)
                x, residual = layer(x, residual)
            side = math.isqrt(x.shape[1])
            return (x + residual).transpose(1, 2).reshape(-1, self.embed_dim, side, side)

        def forward(self, x):
            return self.forward_features(x)

        def no_weight_decay(self):
            return {"pos_embed"}

    backbone = Backbone(32, if_rope=True, if_rope_residual=True, d_state=4, use_middle_cls_token=False)
    out = backbone(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 16, 4, 4)
    out.sum().backward()
    assert backbone.pos_embed.grad.abs().sum() > 0
    assert "head.weight" not in backbone.state_dict()
