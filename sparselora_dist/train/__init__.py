from .closing import closing_words
from .run import run

__all__ = ["closing_words", "run"]
