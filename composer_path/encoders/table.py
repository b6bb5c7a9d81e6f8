"""The table of public encoders, and which of them a name means that isn't in it.

To add one: a `Recipe` in pathology.py or general.py, with where each fact was read. An encoder of your own code is a
`VisionTrunk` in a module that the YAML imports (docs/extending.md).
"""

from __future__ import annotations

import difflib

from composer_path.encoders.general import GENERAL
from composer_path.encoders.pathology import PATHOLOGY
from composer_path.encoders.recipe import Recipe

ENCODERS: dict[str, Recipe] = {**PATHOLOGY, **GENERAL}

# What could not be read is left out, with why.
LEFT_OUT = {
    "quiltnet": "whether its activation is GELU or QuickGELU could not be read; take open_clip/ViT-B-32 or "
    "open_clip/ViT-B-32-quickgelu as its open_clip_config.json says (quick_gelu), which is compared when it is loaded",
}

# Names under which others know them: of hubs, papers and libraries, in lower case and without `_ - . /`.
ALIASES = {
    "univ1": "uni",
    "univ2": "uni2-h",
    "uni2": "uni2-h",
    "provgigapath": "gigapath",
    "hoptimusv0": "h-optimus-0",
    "conchv1": "conch",
    "medsiglip448": "medsiglip",
    "biomedclippubmedbert256vitbasepatch16224": "biomedclip",
    "dinov2vits14": "dinov2-small",
    "dinov2vitb14": "dinov2-base",
    "dinov2vitl14": "dinov2-large",
    "dinov2vitg14": "dinov2-giant",
    "dinov2vits14reg": "dinov2-small-reg",
    "dinov2vitb14reg": "dinov2-base-reg",
    "dinov2vitl14reg": "dinov2-large-reg",
    "dinov2vitg14reg": "dinov2-giant-reg",
    **{f"dinov2withregisters{size}": f"dinov2-{size}-reg" for size in ("small", "base", "large", "giant")},
    "dinov3vits16pretrainlvd1689m": "dinov3-small",
    "dinov3vits16pluspretrainlvd1689m": "dinov3-small-plus",
    "dinov3vitb16pretrainlvd1689m": "dinov3-base",
    "dinov3vitl16pretrainlvd1689m": "dinov3-large",
    "dinov3vith16pluspretrainlvd1689m": "dinov3-huge-plus",
    "dinov3vit7b16pretrainlvd1689m": "dinov3-7b",
    "dinov3vitl16pretrainsat493m": "dinov3-large-sat",
    "dinov3vit7b16pretrainsat493m": "dinov3-7b-sat",
    "siglip2so400mpatch14384": "siglip2-so400m-patch14-378",
    "quiltnetb32": "quiltnet",
    # OpenAI's CLIPs, as transformers and the reference's users name them
    "clipvitbasepatch32": "open_clip/ViT-B-32-quickgelu",
    "clipvitbasepatch16": "open_clip/ViT-B-16-quickgelu",
    "clipvitlargepatch14": "open_clip/ViT-L-14-quickgelu",
    "clipvitlargepatch14336": "open_clip/ViT-L-14-336-quickgelu",
}


def encoder_meant(name: str) -> str | None:
    """A name that is known here for one that isn't, such as `openai/clip-vit-large-patch14-336`; None if there is none.

    Owners of a hub (`MahmoodLab/`, `openai/`) and `_ - .` and case don't count.
    """
    plain = _plain(name.rstrip("/").rpartition("/")[2])
    known = {_plain(own): own for own in (*ENCODERS, *LEFT_OUT)} | ALIASES
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    return known[near[0]] if near else None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
