"""A small model to save, and what a directory holds."""

import functools

from dsv4_eqx import from_pretrained
from dsv4_eqx.config.kinds import HASH_MOE, SLIDING
from tests.models import random_model, small_config


def one_layer(**changes):
    """One layer of the usual small sizes."""
    fields = dict(
        num_hidden_layers=1,
        layer_types=(SLIDING,),
        compress_ratios=(0,),
        mlp_layer_types=(HASH_MOE,),
        num_nextn_predict_layers=0,
    )
    return small_config(**(fields | changes))


@functools.cache
def small_model():
    return random_model(one_layer())


def load_inner(directory, mesh=None, **options):
    """The `DeepSeekV4` that a checkpoint is, over a mesh or not."""
    model = from_pretrained(directory, mesh=mesh, **options)
    return model if mesh is None else model.model


def contents(directory):
    """Every file below a directory and its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
