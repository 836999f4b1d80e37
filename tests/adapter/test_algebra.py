"""Every method against its definition on dense matrices, written here anew; and what must hold for all of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.adapter.algebra import METHODS, Term, combine, factors, plan, sparse
from veneer.adapter.algebra.methods import generators
from veneer.errors import AdapterStateError, ConfigError

KEY = "layers.3.q_proj"
VALUES = [name for name, method in METHODS.items() if method.sparsify]
QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def make(seed, ranks, weights, scalings, d_out=9, d_in=13, dtype=torch.float32):
    """Terms with random factors."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return [Term(draw(r, d_in), draw(d_out, r), s, w) for r, s, w in zip(ranks, scalings, weights)]


@st.composite
def sums(draw, same_rank=False, least=1):
    n = draw(st.integers(least, 3))
    rank = draw(st.integers(1, 5))
    ranks = [rank] * n if same_rank else [draw(st.integers(1, 5)) for _ in range(n)]
    weights = [draw(st.sampled_from([-1.3, -0.4, 0.25, 0.7, 1.0, 2.0])) for _ in range(n)]
    scalings = [draw(st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.0])) for _ in range(n)]  # alpha ≠ r, rsLoRA's √r, …
    d_out, d_in = draw(st.integers(5, 17)), draw(st.integers(5, 17))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    return make(draw(st.integers(0, 999)), ranks, weights, scalings, d_out, d_in, dtype)


def tau(term):
    return term.scaling * (term.lora_B.double() @ term.lora_A.double())


def dense_sum(terms):
    return sum(t.weight * tau(t) for t in terms)


def result(terms, method, **options):
    merged = combine(terms, plan(method, **options), key=KEY)
    return merged.lora_B @ merged.lora_A


def near(found, wanted, tolerance=1e-9):
    return torch.linalg.norm(found - wanted) <= tolerance * (1 + torch.linalg.norm(wanted))


def weights_of(terms):
    return [t.weight for t in terms]


# The definitions, value by value.


def kept_largest(task, count):
    order = sorted(range(task.numel()), key=lambda i: -abs(task.flatten()[i].item()))
    out = torch.zeros(task.numel(), dtype=task.dtype)
    for i in order[:count]:
        out[i] = task.flatten()[i]
    return out.view_as(task)


def elected(tasks, weights, like):
    out = torch.zeros_like(tasks[0]).flatten()
    rows = [task.flatten() for task in tasks]
    for i in range(out.numel()):
        values = [row[i].item() for row in rows]
        votes = values if like == "peft" else [w * v for w, v in zip(weights, values)]
        sign = 1 if sum(votes) >= 0 else -1
        mine = [(w, v) for w, v, vote in zip(weights, values, votes) if vote * sign > 0]
        below = sum(w for w, _ in mine) if like == "mergekit" else len(mine)
        out[i] = sum(w * v for w, v in mine) / below if below else sum(w * v for w, v in mine)
    return out.view_as(tasks[0])


def sparsified(method, tasks, density, gamma, epsilon, draws):
    if method in ("ties", "magnitude-prune", "knots", "core"):
        return [kept_largest(task, max(1, int(density * task.numel()))) for task in tasks]
    if method.startswith("breadcrumbs"):
        n = tasks[0].numel()
        skip, keep = int(gamma * n), max(1, int(density * n))
        both = [(kept_largest(t, skip + keep), kept_largest(t, skip)) for t in tasks]
        return [more - top for more, top in both]
    uniform = [torch.rand(task.shape, generator=draw, dtype=torch.float64) for task, draw in zip(tasks, draws)]
    if method.startswith("dare"):
        return [torch.where(u < density, task / density, 0) for u, task in zip(uniform, tasks)]
    out = []
    for u, task in zip(uniform, tasks):  # DELLA ranks within rows
        new = torch.zeros_like(task)
        for r, row in enumerate(task):
            order = sorted(range(len(row)), key=lambda i: abs(row[i].item()))
            for k, i in enumerate(order):
                p = (density - epsilon) + 2 * epsilon * k / (len(row) - 1)
                new[r, i] = row[i] / p if u[r, i] < p else 0
        out.append(new)
    return out


def merged_values(method, tasks, weights, like, density, gamma, epsilon):
    kept = sparsified(method, tasks, density, gamma, epsilon, generators(5, KEY, len(tasks)))
    if METHODS[method].elects:
        return elected(kept, weights, like)
    return sum(w * task for w, task in zip(weights, kept))


def options_of(method, density, like=None):
    own = {"gamma": 0.1} if "breadcrumbs" in method else {"epsilon": 0.2} if "della" in method else {}
    return {"density": density, "seed": 5, "like": like} | own


# Exact methods.


@QUICK
@given(sums())
def test_cat_is_the_sum_and_svd_its_best_approximation(terms):
    wanted = dense_sum(terms)
    assert near(result(terms, "cat"), wanted)
    merged = combine(terms, plan("cat"))
    assert merged.lora_A.shape[0] == sum(t.rank for t in terms)
    spectrum = torch.linalg.svdvals(wanted)
    for rank in (1, 3, 6):
        merged = combine(terms, plan("svd", rank=rank))
        assert merged.lora_A.shape[0] <= rank
        left = float(torch.linalg.norm(wanted - merged.lora_B @ merged.lora_A))
        best = float(torch.linalg.norm(spectrum[rank:]))
        assert abs(left - best) <= 1e-9 * float(spectrum.norm() + 1)
        assert merged.lost == pytest.approx(best / float(spectrum.norm()), abs=1e-9)
    assert combine(terms, plan("svd")).lora_A.shape[0] <= max(t.rank for t in terms)


def test_best_approximation_equals_the_dense_svd_truncated():
    terms = make(3, [4, 5], [0.7, -0.4], [3.0, 0.5], 11, 8)
    u, s, vh = torch.linalg.svd(dense_sum(terms))
    wanted = u[:, :4] * s[:4] @ vh[:4]
    assert near(result(terms, "svd", rank=4), wanted)
    a, b = factors.truncate_dense(dense_sum(terms), 4)
    assert near(b @ a, wanted)
    a, b = factors.truncate_dense(dense_sum(terms).t(), 4)  # the other Gram matrix
    assert near(b @ a, wanted.t()) and a.shape == (4, 11)


@QUICK
@given(sums(least=2))
def test_norms_and_distances_come_from_factors(terms):
    one, other = factors.total(terms), factors.total(terms[:1])
    wanted, less = dense_sum(terms), dense_sum(terms[:1])
    assert factors.norm(one) == pytest.approx(float(wanted.norm()), rel=1e-9)
    assert factors.distance(one, other) == pytest.approx(float((wanted - less).norm()), rel=1e-9, abs=1e-9)
    assert factors.distance(one, one) <= 1e-12 * factors.norm(one)  # no squares: no floor of 1e-8


@QUICK
@given(sums(same_rank=True))
def test_linear_has_pefts_cross_terms(terms):
    root = [math.sqrt(abs(t.weight * t.scaling)) for t in terms]
    a = sum(math.copysign(x, t.weight) * t.lora_A.double() for x, t in zip(root, terms))
    b = sum(x * t.lora_B.double() for x, t in zip(root, terms))
    assert near(result(terms, "linear"), b @ a)


# Methods that choose values.


@pytest.mark.parametrize("like", [None, "mergekit", "peft"])
@pytest.mark.parametrize("method", [m for m in VALUES if m not in ("knots", "core")])
def test_values_are_chosen_in_the_whole_update_as_defined(method, like):
    terms = make(1, [2, 4, 3], [0.7, -0.4, 1.1], [3.0, 0.5, 1.5], 7, 9)
    merged = combine(terms, plan(method, space="full", **options_of(method, 0.6, like)), key=KEY)
    assert merged.lost < 1e-6 and merged.lora_A.shape[0] == 7  # all of it: rank 9 of 7 rows
    wanted = merged_values(method, [tau(t) for t in terms], weights_of(terms), like, 0.6, 0.1, 0.2)
    assert near(merged.lora_B @ merged.lora_A, wanted, 1e-7)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(sums(), st.sampled_from(["ties", "breadcrumbs", "magnitude-prune", "dare-ties", "della"]), st.data())
def test_values_for_any_sum(terms, method, data):
    density = data.draw(st.sampled_from([0.3, 0.5, 0.8]))
    like = data.draw(st.sampled_from([None, "mergekit", "peft"]))
    found = result(terms, method, space="full", rank=17, **options_of(method, density, like))
    wanted = merged_values(method, [tau(t) for t in terms], weights_of(terms), like, density, 0.1, 0.2)
    assert near(found, wanted, 1e-6)


@pytest.mark.parametrize("like", [None, "peft"])
@pytest.mark.parametrize("method", ["ties", "dare-linear", "dare-ties", "magnitude-prune", "della"])
def test_values_are_chosen_in_a_and_b_apart(method, like):
    terms = make(2, [3, 3], [0.7, -0.4], [3.0, 0.5])
    merged = combine(terms, plan(method, space="factors", **options_of(method, 0.6, like)), key=KEY)
    roots = [math.sqrt(abs(t.weight * t.scaling)) for t in terms]
    signed = [math.copysign(x, t.weight) for x, t in zip(roots, terms)]
    draws = generators(5, KEY, 2)
    for factor, weights in (("lora_A", signed), ("lora_B", roots)):  # one generator draws for A, then for B
        kept = sparsified(method, [getattr(t, factor).double() for t in terms], 0.6, 0.1, 0.2, draws)
        elects = METHODS[method].elects
        wanted = elected(kept, weights, like) if elects else sum(w * t for w, t in zip(weights, kept))
        assert near(getattr(merged, factor), wanted)


def test_like_peft_means_factors_unless_a_space_is_named():
    assert plan("ties", like="peft").space == "factors"
    assert plan("ties", like="peft", space="full").space == "full"
    assert plan("ties").space == "full" and plan("knots", like="peft").space == "knots"


def test_a_negative_weight_turns_the_vote_but_not_as_peft_does():
    tasks, weights = [torch.tensor([3.0, 3.0]).double(), torch.tensor([1.0, -1.0]).double()], [1.0, -4.0]
    assert sparse.elect(tasks, weights).tolist() == [-4.0, 3.5]
    assert sparse.elect(tasks, weights, "peft").tolist() == [-0.5, 3.0]
    assert sparse.elect(tasks, weights, "mergekit").tolist() == [1.0, -7 / 3]


@pytest.mark.parametrize("method", ["dare-linear", "della-linear"])
def test_random_dropping_keeps_the_mean(method):
    terms = make(4, [3], [1.0], [0.5], 5, 6)
    found = [result(terms, method, density=0.6, seed=seed) for seed in range(1500)]
    assert near(torch.stack(found).mean(0), tau(terms[0]), 0.06)
    assert not torch.equal(found[0], found[1])


def test_random_methods_depend_on_seed_and_layer_alone():
    terms = make(4, [3, 2], [1.0, 0.5], [0.5, 2.0])
    chosen = plan("dare-ties", seed=3)
    first, again = combine(terms, chosen, key="a"), combine(terms, chosen, key="a")
    assert torch.equal(first.lora_A, again.lora_A) and torch.equal(first.lora_B, again.lora_B)
    assert not torch.equal(first.lora_B, combine(terms, chosen, key="b").lora_B)
    one = combine(terms[:1], plan("dare-linear", seed=3), key="a")  # an adapter's draw is its own
    two = combine([terms[0], Term(terms[1].lora_A, terms[1].lora_B, 1.0, 0.0)], plan("dare-linear", seed=3), key="a")
    assert near(one.lora_B @ one.lora_A, two.lora_B[:, :3] @ two.lora_A[:3], 1e-2)


# Common bases and spectra.


@pytest.mark.parametrize("like", [None, "peft", "mergekit"])
def test_knots_against_the_svd_of_all_updates_side_by_side(like):
    terms = make(6, [2, 4, 3], [0.7, -0.4, 1.1], [3.0, 0.5, 1.5], 12, 14)
    u, s, vh = torch.linalg.svd(torch.cat([tau(t) for t in terms], dim=1), full_matrices=False)
    keep = s > 1e-5
    assert keep.sum() == 9
    tasks = list((s[keep, None] * vh[keep]).split(14, dim=1))
    wanted = u[:, keep] @ merged_values("ties", tasks, weights_of(terms), like, 0.3, None, None)
    found = combine(terms, plan("knots", density=0.3, like=like), key=KEY)
    assert near(found.lora_B @ found.lora_A, wanted, 1e-8) and found.lora_A.shape[0] == 9 and found.lost == 0


@pytest.mark.parametrize("method", ["ties", "dare-linear", "della"])
def test_core_space_against_dense_bases(method):
    terms = make(7, [2, 4], [0.7, -0.4], [1.0, 1.0], 12, 14)
    u = torch.linalg.svd(torch.cat([t.lora_B.double() for t in terms], 1), full_matrices=False).U
    vh = torch.linalg.svd(torch.cat([t.lora_A.double() for t in terms]), full_matrices=False).Vh
    tasks = [u.t() @ tau(t) @ vh.t() for t in terms]
    assert all(near(u @ task @ vh, tau(t)) for task, t in zip(tasks, terms))  # lossless
    options = options_of(method, 0.5)
    wanted = u @ merged_values(method, tasks, weights_of(terms), None, 0.5, None, 0.2) @ vh
    assert near(result(terms, method, space="core", **options), wanted, 1e-8)


def test_iso_c_flattens_the_spectrum_of_the_sum():
    terms = make(8, [2, 3], [0.7, -0.4], [3.0, 0.5])
    u, s, vh = torch.linalg.svd(dense_sum(terms), full_matrices=False)
    wanted = s[:5].mean() * u[:, :5] @ vh[:5]
    assert near(result(terms, "iso-c"), wanted)


def test_tsv_makes_the_singular_vectors_of_the_tasks_orthogonal():
    terms = make(9, [2, 3, 5], [0.7, -0.4, 1.1], [3.0, 0.5, 1.0], 9, 13)
    parts = [torch.linalg.svd(tau(t), full_matrices=False) for t in terms]
    keep = [2, 3, 3]  # 9 rows for 3 tasks: at most 3 of each
    signs = [1, -1, 1]
    u = torch.cat([sign * p.U[:, :k] for sign, p, k in zip(signs, parts, keep)], 1)
    v = torch.cat([p.Vh[:k].t() for p, k in zip(parts, keep)], 1)
    s = torch.cat([abs(t.weight) * p.S[:k] for t, p, k in zip(terms, parts, keep)])
    procrustes = [torch.linalg.svd(m, full_matrices=False) for m in (u, v)]
    left, right = (p.U @ p.Vh for p in procrustes)
    assert near(left.t() @ left, torch.eye(8, dtype=torch.float64))
    assert near(result(terms, "tsv"), left * s @ right.t())


# For every method.


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), scaling=st.sampled_from([0.25, 1.0, 5.0]), rank=st.integers(1, 4))
def test_one_adapter_and_a_zeroed_one_give_the_one(method, seed, scaling, rank):
    mine, other = make(seed, [rank, rank], [1.0, 1.0], [scaling, 2.0])
    if method == "iso-c":  # flat already: nothing to flatten
        a, b = torch.linalg.qr(mine.lora_A.t())[0].t(), torch.linalg.qr(mine.lora_B)[0]
        mine = Term(a, b, scaling, 1.0)
    a = torch.zeros_like(other.lora_A) if method == "linear" else other.lora_A
    zeroed = Term(a, torch.zeros_like(other.lora_B), other.scaling, other.weight)
    everything = {"density": 1.0} if METHODS[method].sparsify else {}
    everything |= {"gamma": 0.0} if METHODS[method].gamma is not None else {}
    everything |= {"epsilon": 0.0} if METHODS[method].epsilon is not None else {}
    assert near(result([mine, zeroed], method, **everything), tau(mine), 1e-6)
    assert near(result([mine], method, **everything), tau(mine), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_and_nothing_comes_of_nothing(method):
    terms = make(1, [3, 3], [0.7, -0.4], [3.0, 0.5])
    before = [(t.lora_A.clone(), t.lora_B.clone()) for t in terms]
    combine(terms, plan(method, scale=2.0))
    assert all(torch.equal(t.lora_A, a) and torch.equal(t.lora_B, b) for t, (a, b) in zip(terms, before))
    nothing = [Term(t.lora_A, torch.zeros_like(t.lora_B), t.scaling, t.weight) for t in terms]
    merged = combine(nothing, plan(method))
    assert not (merged.lora_B @ merged.lora_A).any() and merged.lora_A.shape[0] >= 1


@pytest.mark.parametrize("method", [m for m in METHODS if m != "cat"])
def test_rank_truncates_and_scale_multiplies(method):
    terms = make(1, [3, 3], [0.7, -0.4], [3.0, 0.5])
    whole = result(terms, method, rank=None if method != "svd" else 6)
    if METHODS[method].space == "full" and METHODS[method].sparsify:
        whole = result(terms, method, rank=9)
    u, s, vh = torch.linalg.svd(whole)
    merged = combine(terms, plan(method, rank=2, scale=3.0), key=KEY)
    assert merged.lora_A.shape[0] == 2
    if METHODS[method].random:
        assert not merged.lora_A.isnan().any() and merged.lost > 0
        return
    assert merged.lost == pytest.approx(float(s[2:].norm() / s.norm()), abs=1e-7)
    if method == "iso-c":  # any two of its equal directions are the best
        assert near(torch.linalg.svdvals(merged.lora_B @ merged.lora_A)[:2], 3.0 * s[:2])
    else:
        assert near(merged.lora_B @ merged.lora_A, 3.0 * u[:, :2] * s[:2] @ vh[:2], 1e-7)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "slerp"}, "no method 'slerp'"),
        ({"method": "cat", "rank": 4}, "use svd"),
        ({"method": "svd", "rank": 0}, "at least 1"),
        ({"method": "svd", "density": 0.5}, "density has no effect with method svd"),
        ({"method": "ties", "gamma": 0.1}, "gamma has no effect"),
        ({"method": "ties", "epsilon": 0.1}, "epsilon has no effect"),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "ties", "density": 1.5}, "above 0"),
        ({"method": "ties", "space": "half"}, "no space 'half'"),
        ({"method": "ties", "like": "vllm"}, "peft or mergekit"),
        ({"method": "knots", "space": "core"}, "use ties with space core"),
        ({"method": "breadcrumbs", "density": 0.9, "gamma": 0.2}, "above 1"),
        ({"method": "della", "density": 0.9, "epsilon": 0.2}, "not within"),
    ],
)
def test_settings_that_cannot_hold_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        plan(settings.pop("method"), **settings)


@pytest.mark.parametrize("options", [{"method": "linear"}, {"method": "ties", "like": "peft"}])
def test_factors_of_different_ranks_are_not_added(options):
    with pytest.raises(AdapterStateError, match="ranks 2, 3 differ"):
        combine(make(1, [2, 3], [1, 1], [1, 1]), plan(**options))
