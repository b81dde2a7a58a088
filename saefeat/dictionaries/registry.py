"""Every kind of dictionary there is. A new kind is one new file and one line here."""

from saefeat.dictionaries.base import Dictionary, DictionaryConfig
from saefeat.dictionaries.batch_topk import BatchTopK
from saefeat.dictionaries.crosscoder import Crosscoder, L1Crosscoder
from saefeat.dictionaries.gated import Gated
from saefeat.dictionaries.jump_relu import JumpReLU
from saefeat.dictionaries.matching_pursuit import MatchingPursuit
from saefeat.dictionaries.matryoshka import Matryoshka
from saefeat.dictionaries.standard import Standard
from saefeat.dictionaries.topk import TopK

KINDS: tuple[type[Dictionary], ...] = (
    Standard,
    Gated,
    TopK,
    BatchTopK,
    JumpReLU,
    Matryoshka,
    MatchingPursuit,
    Crosscoder,
    L1Crosscoder,
)

ARCHITECTURES: dict[str, type[Dictionary]] = {kind.architecture: kind for kind in KINDS}


def dictionary_type(config: DictionaryConfig) -> type[Dictionary]:
    """The kind of dictionary that `config` describes.

    Raises:
        TypeError: `config` is not one of the configs of this library.
    """
    for kind in KINDS:
        if type(config) is kind.config_type:
            return kind
    raise TypeError(
        f"Expected one of {', '.join(kind.config_type.__name__ for kind in KINDS)}, "
        f"got {type(config).__name__}. Pass a config, such as TopKConfig(k=32)."
    )
