"""Encoders of pathology and of biomedicine."""

from __future__ import annotations

from composer_path.encoders.recipe import HALF, IMAGENET, OPENAI, Recipe

# Repositories on github.com, in which a file is named behind the colon.
TRIDENT = "github.com/mahmoodlab/TRIDENT: trident/patch_encoder_models/load.py"
UNI = "github.com/mahmoodlab/UNI: README.md and uni/get_encoder/get_encoder.py"
H_OPTIMUS_NORMALIZATION = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU_NORMALIZATION = (0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)
HIBOU = "github.com/HistAI/hibou: hibou/models/vision_transformer.py, hibou/models/layers/swiglu_ffn.py, example.ipynb"
# A gated MLP as Virchow, UNI2-h and Hibou have it: `mlp_ratio` counts the gate and what it opens.
GATED = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}

PATHOLOGY = {
    "uni": Recipe(
        "timm/vit_large_patch16_224",
        224,
        16,
        IMAGENET,
        "timm",
        (UNI,),
        {"init_values": 1e-5},
    ),
    "uni2-h": Recipe(
        "timm/vit_giant_patch14_224",
        224,
        14,
        IMAGENET,
        "timm",
        (UNI,),
        {
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            **GATED,
        },
        num_prefix_tokens=9,
    ),
    "virchow": Recipe(
        "timm/vit_huge_patch14_224",
        224,
        14,
        IMAGENET,
        "timm",
        (TRIDENT,),
        {"init_values": 1e-5, "mlp_ratio": 5.3375, **GATED},
        num_parameters=632_000_000,
    ),
    "virchow2": Recipe(
        "timm/vit_huge_patch14_224",
        224,
        14,
        IMAGENET,
        "timm",
        (TRIDENT, "arxiv.org/abs/2408.00738 (632 million parameters)"),
        {"init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, **GATED},
        num_prefix_tokens=5,
        num_parameters=632_000_000,
    ),
    "h-optimus-0": Recipe(
        "timm/vit_giant_patch14_reg4_dinov2",
        224,
        14,
        H_OPTIMUS_NORMALIZATION,
        "timm",
        (
            "github.com/bioptimus/releases: models/h-optimus/v0/README.md",
            TRIDENT,
            "huggingface.co/bioptimus/H-optimus-0: config.json (revision refs/pr/2)",
        ),
        {"init_values": 1e-5},
        num_prefix_tokens=5,
    ),
    "h-optimus-1": Recipe(
        "timm/vit_giant_patch14_reg4_dinov2",
        224,
        14,
        H_OPTIMUS_NORMALIZATION,
        "timm",
        (TRIDENT,),
        {"init_values": 1e-5},
        num_prefix_tokens=5,
    ),
    "gigapath": Recipe(
        "timm/vit_giant_patch14_dinov2",
        224,
        16,
        IMAGENET,
        "timm",
        (
            "github.com/prov-gigapath/prov-gigapath: README.md, demo/run_gigapath.ipynb (1,134,953,984 parameters)",
            TRIDENT,
        ),
        {"patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 5.33334},
        num_parameters=1_134_953_984,
    ),
    "hibou-b": Recipe(
        "timm/vit_base_patch14_reg4_dinov2",
        224,
        14,
        HIBOU_NORMALIZATION,
        "transformers' Dinov2 with registers, or the DINOv2 repository's",
        (HIBOU, "huggingface.co/histai/hibou-b: config.json"),
        {"mlp_ratio": 5.33334, **GATED},
        num_prefix_tokens=5,
    ),
    "hibou-l": Recipe(
        "timm/vit_large_patch14_reg4_dinov2",
        224,
        14,
        HIBOU_NORMALIZATION,
        "transformers' Dinov2 with registers, or the DINOv2 repository's",
        (HIBOU, "github.com/HistAI/hibou: hibou/models/cellvit/cellvit.py (HibouEncoder)", TRIDENT),
        {"mlp_ratio": 5.34375, **GATED},
        num_prefix_tokens=5,
    ),
    "phikon": Recipe(
        "timm/vit_base_patch16_224",
        224,
        16,
        IMAGENET,
        "transformers' ViT",
        ("huggingface.co/owkin/phikon: config.json (revision e9ad8d1)", TRIDENT),
        {"norm_eps": 1e-12},
    ),
    "phikon-v2": Recipe(
        "timm/vit_large_patch16_224",
        224,
        16,
        IMAGENET,
        "transformers' Dinov2",
        (
            "arxiv.org/abs/2409.09173 (abstract: a ViT-L of DINOv2)",
            "ramonkaspar.github.io/wsistream/recipes/phikon (ViT-L/16, no registers, of the paper's table 5)",
            TRIDENT,
        ),
        {"init_values": 1e-5},
    ),
    "conch": Recipe(
        "timm/vit_base_patch16_224",
        448,
        16,
        OPENAI,
        "CONCH (timm under `visual.trunk.`)",
        (
            "github.com/mahmoodlab/CONCH: conch/open_clip_custom/coca_model.py, factory.py, "
            "model_configs/conch_ViT-B-16.json",
        ),
    ),
    "conch-v1.5": Recipe(
        "timm/vit_large_patch16_224",
        448,
        16,
        IMAGENET,
        "CONCH (timm under `trunk.`)",
        ("github.com/mahmoodlab/TRIDENT: trident/patch_encoder_models/model_zoo/conchv1_5/conchv1_5.py",),
        {"init_values": 1.0},
    ),
    "plip": Recipe(
        "open_clip/ViT-B-32-quickgelu",
        224,
        32,
        OPENAI,
        "transformers' CLIP",
        (
            "github.com/PathologyFoundation/plip: plip.py (CLIPModel), reproducibility/training_model/clip.py "
            "(OpenAI's ViT-B/32, fine-tuned)",
            "open_clip: model_configs/ViT-B-32-quickgelu.json",
        ),
    ),
    "biomedclip": Recipe(
        "timm/vit_base_patch16_224",
        224,
        16,
        OPENAI,
        "open_clip (timm under `visual.trunk.`)",
        (
            "huggingface.co/naotous/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224_original: open_clip_config.json "
            "(a copy of microsoft's first release)",
        ),
    ),
    "musk": Recipe(
        "timm/beit3_large_patch16_224",
        384,
        16,
        HALF,
        "torchscale's BEiT-3 (`beit3.`)",
        ("github.com/lilab-stanford/MUSK: README.md, musk/modeling.py, musk/utils.py, musk/torchscale",),
        {"fc_norm": False},
    ),
    "medsiglip": Recipe(
        "timm/vit_so400m_patch14_siglip_384",
        448,
        14,
        HALF,
        "transformers' SigLIP",
        (
            "github.com/Google-Health/medsiglip: README.md (400M, 448 px), "
            "notebooks/fine_tune_for_image_classification.ipynb (mean 0.5)",
            "huggingface.co/fokan/MedSigLIP: preprocessor_config.json (a copy)",
            "transformers/models/siglip/configuration_siglip.py (hidden_act gelu_pytorch_tanh)",
        ),
        {"act_layer": "gelu_tanh"},
        num_prefix_tokens=0,
    ),
}
