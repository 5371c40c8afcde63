"""What goes in and out of every part of transformers' model, and its gradients."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from dsv4_eqx import from_state_dict
from tests.models import LENGTH, T, pair, random_tokens


class Call(NamedTuple):
    """One call of a part, all by name but for what came first."""

    first: torch.Tensor
    rest: tuple
    named: dict
    output: object

    @property
    def x(self):
        """What came first, for us."""
        return jnp.asarray(self.first.numpy())


@functools.cache
def captured(seed=0, length=LENGTH):
    """Calls of all parts below the layers, by module name without `model.layers.`."""
    reference, _ = pair(seed)
    calls, handles = {}, []
    for name, module in reference.model.layers.named_modules():

        def record(module, args, kwargs, output, name=name):
            named = dict(kwargs)
            first = args[0] if args else named.pop("hidden_states")
            calls[name] = Call(first, args[1:], named, output)

        if name:
            handles.append(module.register_forward_hook(record, with_kwargs=True))
    with torch.no_grad():
        reference(torch.tensor(tokens(seed, length)).long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def tokens(seed=0, length=LENGTH):
    """The tokens of `captured`."""
    return random_tokens(seed, length)


def positions(x):
    """0, 1, 2, ... in each row of `x`."""
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


def reference_gradients(seed, name, call, cotangent):
    """Gradients of the sum of `output * cotangent` of a part called again.

    Those of the weights in the shape of our model, where zeros stand for none.
    """
    reference, _ = pair(seed)
    reference.zero_grad()
    x = call.first.clone().requires_grad_()
    output = reference.model.layers.get_submodule(name)(x, *call.rest, **call.named)
    output = output[0] if isinstance(output, tuple) else output
    (output * torch.tensor(np.asarray(cotangent))).sum().backward()
    gradients = {
        key: value.detach().numpy() for key, value in reference.state_dict().items()
    }
    for key, parameter in reference.named_parameters():
        gradient = parameter.grad
        gradients[key] = np.zeros(parameter.shape, np.float32)
        if gradient is not None:
            gradients[key] = gradient.numpy().copy()
    reference.zero_grad()
    return from_state_dict(T, gradients), jnp.asarray(x.grad.numpy())
