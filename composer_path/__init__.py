"""composer_path: train and finetune pathology vision-language models on MosaicML Composer and Streaming."""

__version__ = "0.1.0"
