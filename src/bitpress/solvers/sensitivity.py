"""What a change of a weight does to the loss."""

from torch import Tensor


def squared_slope(delta: Tensor, gradient: Tensor) -> float:
    """The second-order increase of the loss that a change of a weight makes, twice, from one gradient.

    Where the labels y are drawn from the model's own predictions p, the divergence between p and the predictions of
    the changed model is, to second order, ``KL = 1/2 E_y[(d . g)^2]`` with d the change and g the gradient of
    ``log p(y)`` at the weight (Fisher's matrix is the covariance of g, and the Hessian of the divergence). Errors of
    rounding in different rows are not correlated, so that their products average out: what is left, the sum over the
    rows of ``(d_i . g_i)^2``, is of so many terms that a few gradients are enough.

    Own: the step from Fisher's matrix to the rows.

    Args:
        delta: (out, in), the changed weight minus the weight, float32.
        gradient: (out, in), any float dtype: of the log-likelihood of all labels of a draw, summed.
    """
    return float((delta * gradient).sum(1).double().square().sum())
