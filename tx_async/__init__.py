"""tx_async: a self-hosted server for the Tinker API. One engine trains and samples; users share it through LoRA."""

__version__ = "0.1.0"
