import logging

import pytest


@pytest.fixture(autouse=True)
def _log_levels_are_those_of_a_fresh_process():
    """Both programs set them, and some tests run them in this process."""
    yield
    for package in ("glide_finetune", "glide_text2im"):
        logging.getLogger(package).setLevel(logging.NOTSET)
