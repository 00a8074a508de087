"""What torch would import its compiler for, though nothing is compiled."""

import inspect

from torch.optim import Optimizer


class Uncompiled(Optimizer):
    """An optimizer that does without torch's compiler.

    Those of torch import it when they are made and in each of these methods, to have it leave them
    alone should anybody compile them. That takes 6 s on two cores, longer than torch itself.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
