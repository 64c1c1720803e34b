"""Libraries that say less. Imports none of them."""

import logging
import warnings


def silence_warnings() -> None:
    """For this process, before they are imported."""
    for name in ("torch._library.triton", "matplotlib", "vllm.logging_utils.dump_input"):
        logging.getLogger(name).addFilter(is_critical)  # levels are set again by the libraries
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    # vLLM's weight transfer of one that is larger than a part.
    warnings.filterwarnings("ignore", "Tensor '.*' has size .* buffer_size_bytes")


def is_critical(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL
