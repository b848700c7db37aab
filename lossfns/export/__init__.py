"""Other contracts of a loss: a traced function of one datum, a service's built-in, the gradient by token."""

from lossfns.export.datums import Folded as Folded
from lossfns.export.datums import as_datum_fn as as_datum_fn
from lossfns.export.datums import fold as fold
from lossfns.export.datums import with_denominators as with_denominators
from lossfns.export.per_datum import per_datum as per_datum
from lossfns.export.token_gradient import token_gradient as token_gradient
