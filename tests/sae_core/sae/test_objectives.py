"""Every term of every loss against its equation written densely, in values and in gradients, float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sae_core.sae import ARCHITECTURES, Normaliser, SAEConfig, TrainConfig, Trainer
from sae_core.sae.constraints import DECAY_DEAD_THETA, UNIT_NORM, normalise_rows, remove_parallel
from sae_core.sae.kernels import CPU, DENSE
from sae_core.sae.objectives import L0, ORTHOGONALITY, Forward, auxk, loss_of, orthogonality

D_MODEL, N_FEATURES, K, BANDWIDTH = 5, 16, 2, 0.4
LEARNED = ["W_enc", "W_dec", "b_enc", "b_dec", "theta", "r_mag"]


def learner(arch: str = "batchtopk", *, kernel=CPU, silent: tuple[int, ...] = (), **config) -> Trainer:
    """A trainer in float64 with every weight away from its start, whose `silent` features never fire."""
    generator = torch.Generator().manual_seed(1)
    options = {"bandwidth": BANDWIDTH, "l1_coefficient": 0.3, "k_aux": 2, **config}
    sae_config = SAEConfig(d_model=D_MODEL, n_features=N_FEATURES, k=K, arch=arch, **options)
    made = Trainer(sae_config, TrainConfig(n_steps=10), Normaliser.fit([torch.randn(9, D_MODEL)]), kernel=kernel)
    made.sae.double()
    made.r_mag.data = made.r_mag.data.double()
    with torch.no_grad():
        for name in LEARNED:
            weight = made.r_mag if name == "r_mag" else getattr(made.sae, name)
            if name in ("theta", "r_mag") and name not in made.sae.architecture.learned:
                continue
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        # too small ever to be among the largest, or below any threshold
        made.sae.W_enc[list(silent)] *= 0.01
        made.sae.b_enc[list(silent)] = 0.0
        if "theta" in made.sae.architecture.learned:
            made.sae.theta[list(silent)] = 50.0
    made._workspace = torch.empty(0, N_FEATURES, dtype=torch.float64)
    return made


def batch(n_tokens: int = 23) -> Tensor:
    return torch.randn(n_tokens, D_MODEL, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def dense_codes(arch: str, sae, pre: Tensor) -> Tensor:
    """The code of a batch [token feature] written without any of the package's pieces, differentiable in `pre`."""
    positive = pre.relu()
    if arch == "topk":
        return positive * torch.zeros_like(pre).scatter(1, positive.topk(K, dim=1).indices, 1.0)
    if arch in ("batchtopk", "matryoshka"):
        cutoff = positive.flatten().topk(K * len(pre)).values[-1]
        return positive * (positive >= cutoff)
    if arch == "standard":
        return positive
    if arch == "gated":
        return positive * (pre > sae.theta)
    return StraightThroughJump.apply(pre, sae.theta)


class StraightThroughJump(torch.autograd.Function):
    """JumpReLU's two pseudo-derivatives over the whole dense matrix, by a loop over features."""

    @staticmethod
    def forward(ctx, pre, theta):
        ctx.save_for_backward(pre, theta)
        return torch.where(pre > theta, pre, 0.0)

    @staticmethod
    def backward(ctx, d_z):
        pre, theta = ctx.saved_tensors
        d_theta = torch.zeros_like(theta)
        for f in range(N_FEATURES):
            for t in range(len(pre)):
                if abs(pre[t, f] - theta[f]) / BANDWIDTH < 0.5:
                    d_theta[f] -= theta[f] / BANDWIDTH * d_z[t, f]
        return d_z * (pre > theta), d_theta


class StraightThroughCount(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, theta):
        ctx.save_for_backward(pre, theta)
        return (pre > theta).double().sum()

    @staticmethod
    def backward(ctx, d_count):
        pre, theta = ctx.saved_tensors
        return None, -((pre - theta).abs() / BANDWIDTH < 0.5).double().sum(dim=0) / BANDWIDTH * d_count


def dense_term(name: str, arch: str, made: Trainer, x: Tensor, dead: Tensor) -> Tensor:
    """One term by its equation, from dense matrices and plain autograd."""
    sae = made.sae
    pre = x @ sae.W_enc.T + sae.b_enc
    z = dense_codes(arch, sae, pre)
    if name == "reconstruction":
        stops = sae.config.group_stops if arch == "matryoshka" else (N_FEATURES,)
        prefixes = [z[:, :stop] @ sae.W_dec[:stop] + sae.b_dec for stop in stops]
        return sum((x - x_hat).square().sum() / len(x) for x_hat in prefixes) / len(stops)
    if name == "auxk":
        e = (x - z @ sae.W_dec - sae.b_dec).detach()
        acts = torch.where(dead, pre.relu(), 0.0)
        kept = acts * torch.zeros_like(acts).scatter(1, acts.topk(min(2, int(dead.sum())), dim=1).indices, 1.0)
        return (e - kept @ sae.W_dec).square().sum() / (e - e.mean(0)).square().sum()
    if name == "orthogonality":
        products = sae.W_dec @ sae.W_dec.T - 1e9 * torch.eye(N_FEATURES, dtype=torch.float64)
        return products.amax(dim=1).relu().square().mean()
    if name == "l1":
        return z.sum(dim=1).mean()
    if name == "l0":
        return (StraightThroughCount.apply(pre, sae.theta) / len(x) / K - 1) ** 2
    # the paper's form of the gate: its own weights and bias, the magnitude's tied to them
    W_gate = torch.exp(-made.r_mag)[:, None] * sae.W_enc
    b_gate = torch.exp(-made.r_mag) * (sae.b_enc - sae.theta)
    gate = (x @ W_gate.T + b_gate).relu()
    if name == "gate_l1":
        return gate.sum(dim=1).mean()
    return (x - gate @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum(dim=1).mean()


TERMS = [(arch, term) for arch, record in ARCHITECTURES.items() for term in record.objective]


@pytest.mark.parametrize("kernel", [CPU, DENSE], ids=["cpu", "reference"])
@pytest.mark.parametrize(("arch", "term"), TERMS, ids=[f"{arch}-{term.name}" for arch, term in TERMS])
def test_a_term_equals_its_dense_equation_in_value_and_gradients_and_reaches_the_encoder(arch, term, kernel):
    silent = (1, 4, 11)
    made, x = learner(arch, kernel=kernel, silent=silent), batch()
    dead = torch.zeros(N_FEATURES, dtype=torch.bool).index_fill(0, torch.tensor(silent), True)
    forward = made._forward(x, dead)
    fired = torch.zeros(N_FEATURES, dtype=torch.bool).index_fill(0, forward.codes.col.long(), True)
    assert arch == "standard" or not bool((fired & dead).any())
    sparse, dense = term.value(forward), dense_term(term.name, arch, made, x, dead)
    assert sparse.item() == pytest.approx(dense.item(), rel=1e-9)
    weights = list(made._learned.values())
    found, expected = (
        torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True) for value in (sparse, dense)
    )
    for name, a, b in zip(made._learned, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)
    # the count of active features moves thresholds alone (arXiv 2407.14435), the penalty the decoder; all else W_enc
    name = {L0: "theta", ORTHOGONALITY: "W_dec"}.get(term, "W_enc")
    reached = dict(zip(made._learned, found, strict=True))[name]
    assert bool(reached.abs().sum() > 0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_loss_is_the_weighted_sum_of_its_terms_and_sparsity_alone_is_warmed_up(arch):
    made = learner(arch, silent=(1, 4), orthogonality_coefficient=0.7)
    dead = torch.zeros(N_FEATURES, dtype=torch.bool).index_fill(0, torch.tensor([1, 4]), True)
    forward, objective = made._forward(batch(), dead), made.sae.architecture.objective
    weights = {"reconstruction": 1.0, "auxk": 1 / 32, "l1": 0.3, "gate_l1": 0.3, "gate_reconstruction": 1.0, "l0": 1.0}
    weights["orthogonality"] = 0.7
    sparsity = {"l1", "gate_l1", "l0"}
    for warm_up in (1.0, 0.25):
        loss = loss_of(objective, forward, warm_up=warm_up)
        expected = sum(
            weights[name] * (warm_up if name in sparsity else 1.0) * term.item() for name, term in loss.terms.items()
        )
        assert loss.total.item() == pytest.approx(expected, rel=1e-12)
        assert loss.mse.item() == pytest.approx((forward.x - forward.x_hat).square().sum(1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("arch", ["batchtopk", "topk", "matryoshka", "standard"])
def test_gradients_of_the_whole_loss_equal_finite_differences(arch):
    """Where no straight-through estimate or frozen decoder is in the way; steps too small to change what is chosen."""
    made, x = learner(arch, orthogonality_coefficient=0.5), batch(7)
    alive = torch.zeros(N_FEATURES, dtype=torch.bool)

    def loss() -> Tensor:
        return loss_of(made.sae.architecture.objective, made._forward(x, alive)).total

    grads = torch.autograd.grad(loss(), list(made._learned.values()))
    for weight, grad in zip(made._learned.values(), grads, strict=True):
        flat = weight.data.view(-1)
        for place in range(0, flat.numel(), max(1, flat.numel() // 9)):
            kept = flat[place].item()
            flat[place] = kept + 1e-7
            up = loss().item()
            flat[place] = kept - 1e-7
            down = loss().item()
            flat[place] = kept
            assert grad.view(-1)[place].item() == pytest.approx((up - down) / 2e-7, rel=1e-4, abs=1e-6)


def test_matryoshka_costs_one_group_what_batchtopk_costs():
    x, alive = batch(), torch.zeros(N_FEATURES, dtype=torch.bool)
    nested, plain = learner("matryoshka", groups=(1.0,)), learner("batchtopk")
    losses = [loss_of(m.sae.architecture.objective, m._forward(x, alive)).total.item() for m in (nested, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_the_nested_reconstructions_of_matryoshka_end_in_the_whole_reconstruction_and_skip_no_group():
    made = learner("matryoshka")
    forward = made._forward(batch(), torch.zeros(N_FEATURES, dtype=torch.bool))
    dense = forward.codes.to_dense()
    assert made.sae.config.group_stops == (1, 2, 4, 8, 16)
    for group, stop in enumerate(made.sae.config.group_stops):
        expected = dense[:, :stop] @ made.sae.W_dec[:stop] + made.sae.b_dec
        torch.testing.assert_close(forward.nested_x_hat[group], expected)


def test_the_gates_of_gated_open_where_the_papers_do_and_magnitudes_are_the_papers():
    made, x = learner("gated"), batch()
    sae, ratio = made.sae, torch.exp(made.r_mag)
    W_gate, b_gate = sae.W_enc / ratio[:, None], (sae.b_enc - sae.theta) / ratio
    opened = x @ W_gate.T + b_gate > 0
    expected = opened * (x @ (W_gate * ratio[:, None]).T + sae.b_enc).relu()
    codes = made._forward(x, torch.zeros(N_FEATURES, dtype=torch.bool)).codes
    torch.testing.assert_close(codes.to_dense(), expected)
    assert codes.nnz == int(opened.sum())


def test_half_of_jumprelus_window_lies_below_the_threshold():
    made, x = learner("jumprelu"), batch()
    codes = made._forward(x, torch.zeros(N_FEATURES, dtype=torch.bool)).codes
    pre = (x @ made.sae.W_enc.T + made.sae.b_enc).detach()
    assert codes.nnz == int((pre > made.sae.theta - BANDWIDTH / 2).sum())
    assert int((codes.value > 0).sum()) == int((pre > made.sae.theta).sum()) < codes.nnz


def test_auxk_reaches_encoder_decoder_and_bias_of_the_dead_features_and_no_others():
    made = learner(silent=(1, 4, 5))
    dead = torch.zeros(N_FEATURES, dtype=torch.bool).index_fill(0, torch.tensor([1, 4, 5]), True)
    grads = torch.autograd.grad(auxk(made._forward(batch(), dead)), made.sae.weights[:4], allow_unused=True)
    for grad in grads[:3]:
        assert (grad.reshape(N_FEATURES, -1).abs().sum(dim=1) > 0).tolist() == dead.tolist()
    assert grads[3] is None


def test_a_dead_feature_whose_pre_activation_is_not_positive_is_no_pick():
    made = learner()
    with torch.no_grad():
        made.sae.b_enc[4] = -100.0
    dead = torch.zeros(N_FEATURES, dtype=torch.bool).index_fill(0, torch.tensor([1, 4]), True)
    grad = torch.autograd.grad(auxk(made._forward(batch(), dead)), made.sae.W_enc)[0]
    assert bool((grad[1] != 0).any())
    assert not bool((grad[4] != 0).any())


@pytest.mark.parametrize(("silent", "coefficient"), [((), 1 / 32), ((1, 4), 0.0)])
def test_auxk_is_zero_without_dead_features_or_weight(silent, coefficient):
    made = learner(silent=silent, aux_coefficient=coefficient)
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    dead[list(silent)] = True
    loss = loss_of(made.sae.architecture.objective, made._forward(batch(), dead))
    assert loss.terms["auxk"].item() == 0.0
    assert loss.total.item() == loss.mse.item()


def test_a_perfect_reconstruction_leaves_auxk_zero_and_its_gradients_finite():
    made = learner(silent=(1, 4))
    dead = torch.zeros(N_FEATURES, dtype=torch.bool).index_fill(0, torch.tensor([1, 4]), True)
    forward = made._forward(batch(), dead)
    loss = auxk(Forward(**{**vars(forward), "nested_x_hat": (forward.x,)}))
    assert loss.item() == 0.0
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, made.sae.weights[:3], allow_unused=True))


def test_the_penalty_on_alike_rows_passes_gradcheck_and_is_zero_between_rows_that_do_not_point_the_same_way():
    made = learner()
    forward = made._forward(batch(), torch.zeros(N_FEATURES, dtype=torch.bool))

    def penalty(W_dec: Tensor) -> Tensor:
        return orthogonality(Forward(**{**vars(forward), "weights": forward.weights._replace(W_dec=W_dec)}))

    rows = functional.normalize(torch.randn(N_FEATURES, D_MODEL, dtype=torch.float64), dim=1).requires_grad_()
    assert torch.autograd.gradcheck(penalty, (rows,))
    axes = torch.eye(D_MODEL, dtype=torch.float64)
    for none_alike in (axes, torch.cat([axes, -axes]), axes[:1]):
        assert penalty(none_alike).item() == 0
    # two of five rows have the cosine .6
    axes[1, :2] = torch.tensor([0.6, 0.8], dtype=torch.float64)
    assert penalty(axes).item() == pytest.approx(2 * 0.36 / 5)


def test_rows_are_compared_inside_chunks_that_each_step_draws_anew(monkeypatch):
    monkeypatch.setattr("sae_core.sae.objectives.CHUNK", 5)
    made = learner()
    forward = made._forward(batch(), torch.zeros(N_FEATURES, dtype=torch.bool))
    products = (made.sae.W_dec @ made.sae.W_dec.T).detach()
    values = set()
    for step in range(6):
        order = torch.randperm(N_FEATURES, generator=torch.Generator().manual_seed(step)).tolist()
        chunks = [order[start : start + 4] for start in range(0, N_FEATURES, 4)]
        expected = sum(
            max(0.0, *(products[f, g].item() for g in chunk if g != f)) ** 2 for chunk in chunks for f in chunk
        )
        value = orthogonality(Forward(**{**vars(forward), "step": step})).item()
        assert value == pytest.approx(expected / N_FEATURES)
        values.add(value)
    assert len(values) == 6
    assert forward.step == 0


def test_the_penalty_turns_alike_rows_away_from_each_other():
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(3))
    largest = []
    for coefficient in (0.0, 5.0):
        config = SAEConfig(d_model=8, n_features=32, k=2, orthogonality_coefficient=coefficient)
        made = Trainer(config, TrainConfig(n_steps=60, batch_size=100), Normaliser.fit([x]))
        for step in range(60):
            made.step(x[step * 100 % 2000 :][:100])
        rows = made.sae.W_dec.detach()
        largest.append(float((rows @ rows.T).fill_diagonal_(-1).amax(dim=1).mean()))
    assert largest[1] < largest[0] - 0.05


def test_the_gradient_parallel_to_a_unit_row_is_removed():
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).repeat(700, 1)  # more rows than a chunk
    grad = torch.tensor([[3.0, 4.0], [1.0, 1.0]]).repeat(700, 1)
    remove_parallel(grad, rows)
    torch.testing.assert_close((grad * rows).sum(dim=1), torch.zeros(1400), atol=1e-6, rtol=0)
    torch.testing.assert_close(grad[::2], torch.tensor([[0.0, 4.0]]).expand(700, 2))


def test_rows_are_brought_back_to_unit_length_without_turning():
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    normalise_rows(rows)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    assert math.isclose(rows[0].norm().item(), 1.0, abs_tol=1e-6)


@torch.no_grad()
def test_a_constraint_acts_on_what_it_names_and_on_nothing_else():
    weights, dead = learner("jumprelu").sae.weights, torch.zeros(N_FEATURES, dtype=torch.bool)
    dead[5] = True
    weights.theta[3] = -0.2
    weights.W_dec.mul_(2.0)
    before = [weight.clone() for weight in weights]
    DECAY_DEAD_THETA.after_step(weights, dead)
    assert weights.theta[3] == 0.0
    assert weights.theta[5] == pytest.approx(0.98 * before[4][5])
    assert torch.equal(weights.theta[6:], before[4][6:])
    assert torch.equal(weights.W_dec, before[1])
    UNIT_NORM.after_step(weights, dead)
    torch.testing.assert_close(weights.W_dec, functional.normalize(before[1], dim=1))
    assert all(torch.equal(weights[i], before[i]) for i in (0, 2, 3))
