"""What becomes of a context before a field takes it; kept with the flow, so contexts stay in data units."""

from flows.encoders.base import Encoder
from flows.encoders.embedding import Embedding
from flows.encoders.standardised import Standardised

__all__ = ["Embedding", "Encoder", "Standardised"]
