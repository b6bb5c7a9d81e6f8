"""Exported models in evaluation harnesses: lmms-eval finds them by an entry point, kaiko-eva by a configuration."""
