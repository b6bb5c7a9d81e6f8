"""Names that people bring from other libraries and papers for parts that are called otherwise here, or not there."""

from __future__ import annotations

_GONE = "llm-foundry's isn't there"
_NAMES: dict[str, dict[str, str]] = {
    "algorithms": {
        "grad_clip": "use gradient_clipping",
        "clipping": "use gradient_clipping",
        "gradient_clip": "use gradient_clipping",
        "exponential_moving_average": "use ema",
        "stochastic_weight_averaging": "use swa",
    },
    "callbacks": {
        "lr_logger": "use lr_monitor",
        "learning_rate_monitor": "use lr_monitor",
        "scheduled_gc": f"{_GONE}; leave it out",
        "hf_checkpointer": "use save_weights, which writes models to hand on",
        "early_stopping": "use early_stopper",
        "model_checkpoint": "use trainer.save_interval and its neighbours",
    },
    "loggers": {
        "tensor_board": "use tensorboard",
        "wand_b": "use wandb",
        "weights_and_biases": "use wandb",
        "ml_flow": "use mlflow",
        "comet": "use cometml",
        "comet_ml": "use cometml",
        "csv": "use file",
        "stdout": "use trainer.log_to_console",
    },
}


def foreign_names(section: str) -> dict[str, str]:
    """What to write in a section in place of such a name."""
    return _NAMES[section]
