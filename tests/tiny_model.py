"""A model folder as a finetuning run leaves it, but random and tiny."""

from __future__ import annotations

from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
IMAGES = REPO_ROOT / "test_data" / "imgs"
MAX_SEQ_LEN = 128
NUM_IMAGE_TOKENS = 4


def tiny_model_folder(folder: Path, template: str = "llava_llama_2") -> Path:
    """The folder, written if it isn't there yet."""
    if (folder / "config.json").is_file():
        return folder
    from composer_path.images.pixels import ImagePreparation, pad_color_of
    from composer_path.records.prompts import get_template
    from composer_path.records.tokenize import TextPreparation
    from composer_path.records.vocabulary import load_tokenizer
    from composer_path.run.export import write_model
    from composer_path.weights.assembly import assemble_model

    model = assemble_model(
        vision_encoder={
            "name": "timm/vit_tiny_patch16_224",
            "image_size": 32,
            "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        projector={"pooler": {"dim": 16, "num_queries": NUM_IMAGE_TOKENS, "num_heads": 2}, "mlp": {"depth": 1}},
        language_model={
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 32000,
                "initializer_range": 0.3,  # answers then depend on everything that is asked and shown
            }
        },
        trainable=["projector", "language_model"],
    )
    encoder = model.vision_encoder
    text = TextPreparation(get_template(template), NUM_IMAGE_TOKENS, MAX_SEQ_LEN)
    images = ImagePreparation(encoder.image_size, pad_color=pad_color_of(encoder.mean))
    tokenizer = load_tokenizer(REPO_ROOT / "test_data" / "tokenizer")
    write_model(folder, model, model.state_dict(), tokenizer, text, images)
    return folder
