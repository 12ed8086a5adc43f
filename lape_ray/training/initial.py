"""The weights that a run starts from: another run's, or other code's.

Shapes: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from lape_ray.config import DataConfig
from lape_ray.model import Network
from lape_ray.model.convert import HEADS, convert_state_dict, load_weights
from lape_ray.storage import local
from lape_ray.training.checkpoint import about, read_weights
from lape_ray.training.classes import checkpoint_classes, other_classes, places_of, text_order
from lape_ray.training.preprocessing import differs, of_checkpoint


def load_initial(network: Network, path: str, data: DataConfig, classes: Sequence[str] | None) -> list[str]:
    """Load the checkpoint at `path` into a fresh network; the rows of its head go to the classes of their names.

    A head without the name of one of `classes` (K; None: they have no names), or of another size, is left fresh.
    Returns lines for people.

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint, or one of another network.
    """
    weights, config = read_weights(path)
    with about(path):
        state, notes = convert_state_dict(weights), list[str]()
        own, theirs = network.state_dict(), checkpoint_classes(path)
        heads = [name for name in HEADS if name in state and name in own]
        if heads and classes is not None and theirs is not None:
            places = places_of(classes, theirs)
            if places is None:
                state |= {name: own[name] for name in heads}
                notes.append(
                    f"its head is left out and starts fresh: the data {other_classes(classes, theirs, path)}"
                )
            elif places != list(range(len(theirs))):
                state |= {name: state[name][places] for name in heads}
                notes.append("the rows of its head are taken by the names of the classes")
        elif heads and classes is not None and state[heads[0]].shape == own[heads[0]].shape:
            notes.append(text_order(classes, of=path, path=data.train))
        notes += load_weights(network, state, new_head=True)
    there = config.data if config is not None else of_checkpoint(local(path))
    notes += [] if there is None else differs(there, data)
    return [note for note in notes if note]
