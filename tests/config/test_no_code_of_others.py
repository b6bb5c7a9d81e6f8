"""No key of a YAML lets code of others run, or fetches a file that is then unpickled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from composer_path.config.reading import ConfigError, load_config
from composer_path.models.vision_encoder import untrained_vision_encoder
from composer_path.records.vocabulary import load_tokenizer

LLAMA = "model.language_model={path: null, config: {model_type: llama, %s}}"
WAYS = [
    ("tokenizer.trust_remote_code=true", "tokenizer.trust_remote_code: is not set here"),
    ("tokenizer.trust_remote_code=false", "tokenizer.trust_remote_code: is not set here"),
    ("tokenizer.code_revision=main", "tokenizer.code_revision: is not set here"),
    ("tokenizer.auto_map={AutoTokenizer: [a.B, null]}", "tokenizer.auto_map: is not set here"),
    ("tokenizer.local_files_only=false", "tokenizer.local_files_only: is not set here"),
    ("model.vision_encoder.kwargs={checkpoint_path: x.pth}", r"kwargs: \['checkpoint_path'\] can't be given here"),
    ("model.vision_encoder.kwargs={pretrained: true}", r"kwargs: \['pretrained'\] can't be given here"),
    ("model.vision_encoder.kwargs={pretrained_cfg: {file: x}}", r"kwargs: \['pretrained_cfg'\] can't be given here"),
    ("model.vision_encoder.kwargs={timm_model_name: 'local-dir:x', timm_model_pretrained: true}", "timm_model_pretr"),
    ("model.vision_encoder.kwargs={timm_model_name: 'hf-hub:a/b'}", r"\['timm_model_name'\] can't be given here"),
    ("model.vision_encoder.name=timm/hf-hub:a/b", "timm has no model 'hf-hub:a/b'"),
    ("model.vision_encoder.name=timm/local-dir:/x", "timm has no model 'local-dir:/x'"),
    ("model.vision_encoder.name=open_clip/local-dir:/x", "open_clip has no model 'local-dir:/x'"),
    ("model.vision_encoder.trust_remote_code=true", "vision_encoder.trust_remote_code: unknown key"),
    ("model.language_model.trust_remote_code=true", "language_model.trust_remote_code: unknown key"),
    (LLAMA % "trust_remote_code: true", "unknown key 'trust_remote_code'"),
    (LLAMA % "auto_map: {AutoConfig: a.B}", "unknown key 'auto_map'"),
    (LLAMA % "attn_implementation: a/b", "unknown key 'attn_implementation'"),
    (LLAMA % "transformers_weights: x.bin", "unknown key 'transformers_weights'"),
    (LLAMA % "quantization_config: {quant_method: x}", "unknown key 'quantization_config'"),
]


@pytest.mark.parametrize(("override", "message"), WAYS)
def test_it_is_refused_by_name(override: str, message: str, repo_root: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(repo_root / "yamls" / "pretrain.yaml", [override])


def test_a_caller_of_the_functions_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.trust_remote_code: is not set here"):
        load_tokenizer(tmp_path, trust_remote_code=True)
    torch.save({}, tmp_path / "x.pth")
    for name in ("timm/vit_tiny_patch16_224", "open_clip/ViT-B-32"):
        for key in ("checkpoint_path", "timm_model_name", "pretrained_cfg_overlay"):
            with pytest.raises(ValueError, match=rf"vision_encoder\.kwargs: \['{key}'\] can't be given here"):
                untrained_vision_encoder(name, kwargs={key: str(tmp_path / "x.pth")})
