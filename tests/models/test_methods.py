"""BYOL, MoBY and SynCo: losses, key branch, queues, and all recipes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import ROOT, reference, spawn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import METHODS, build_method
from models.batch_norm import synchronize_batch_norm
from models.byol import BYOL
from models.encoder import create_encoder
from models.moby import MoBY
from models.momentum import MLPHead, key_momentum, spread_figures
from models.synco import Draws, SynCo
from optimizer import build_optimizer
from utils.config import load_config
from utils.distributed import data_parallel
from utils.errors import UserError

LARGE = ("synco_vit_large", "synco_vit_huge")  # too large to be trained here
RECIPES = sorted(p for p in (ROOT / "configs").glob("*_*_*.yaml") if p.stem not in LARGE)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

MADE = torch.tensor(True)  # the update whose keys are kept


class Features(nn.Module):
    """An encoder of 8 features."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, 8)

    def forward(self, images):
        return self.linear(images.flatten(1))


@pytest.fixture
def losses():
    data = reference("losses.npz")
    return {name: torch.from_numpy(data[name]) for name in data.files}


def reference_draws(losses) -> Draws:
    columns = [losses[f"type{i}_randint"] for i in range(1, 7)]
    columns[2], other = losses["type3_randint"]
    uniform = [losses[f"type{i}_rand"][..., 0] for i in (1, 2, 3)]
    return Draws([*columns, other], uniform, losses["type4_randn_like"])


def materialised(q, queue, draws: Draws, method: SynCo) -> list[torch.Tensor]:
    """The negatives of the six types as vectors, straight from their definitions."""
    n = [queue.T[c] for c in draws.columns]  # BxN_ixD each
    query = q.detach()[:, None]
    low_high = (method.alpha, method.beta, method.gamma)
    a, b, g = (
        (low + (high - low) * u)[..., None]
        for (low, high), u in zip(low_high, draws.uniform, strict=True)
    )
    gradients = []
    for keys in (n[4], n[5]):
        keys = keys.clone().requires_grad_()
        gradients += torch.autograd.grad((query * keys).sum(), keys)
    vectors = [
        a * query + (1 - a) * n[0],
        query + b * (n[1] - query),
        g * n[2] + (1 - g) * n[6],
        n[3] + method.sigma * draws.normal,
        n[4] + method.delta * gradients[0],
        n[5] + method.eta * gradients[1].sign(),
    ]
    return [F.normalize(v, dim=2) for v in vectors]


def test_moby_equals_the_published_loss(losses):
    method = MoBY(Features(), Features(), num_negatives=512)
    q = losses["q"].requires_grad_()
    loss, _, _ = method._contrast(q, losses["k"], losses["queue"], 0)
    loss.backward()
    torch.testing.assert_close(loss, losses["moby_loss"], **TOLERANCE)
    torch.testing.assert_close(q.grad, losses["moby_grad_q"], **TOLERANCE)


def test_synco_equals_the_published_loss(losses, monkeypatch):
    method = SynCo(Features(), Features(), num_negatives=512, n_hard=32, counts=(16,) * 6)
    draws = reference_draws(losses)
    monkeypatch.setattr(method, "draw", lambda similarity, dim: draws)
    q = losses["q"].requires_grad_()
    loss, _, _ = method._contrast(q, losses["k"], losses["queue"], 50)
    loss.backward()
    torch.testing.assert_close(loss, losses["synco_loss"], **TOLERANCE)
    torch.testing.assert_close(q.grad, losses["synco_grad_q"], **TOLERANCE)


@pytest.mark.parametrize("kind", range(1, 7))
def test_negatives_equal_the_published_ones(losses, kind):
    method = SynCo(Features(), Features(), num_negatives=512, n_hard=32, counts=(16,) * 6)
    q, queue = losses["q"], losses["queue"]
    draws = reference_draws(losses)
    published = losses[f"type{kind}_negatives"]
    torch.testing.assert_close(
        materialised(q, queue, draws, method)[kind - 1], published, **TOLERANCE
    )
    torch.testing.assert_close(
        method.synthetic(q, q @ queue, queue, draws)[kind - 1],
        torch.einsum("bd,bnd->bn", q, published),
        **TOLERANCE,
    )


def test_hard_keys_are_the_published_ones(losses):
    method = SynCo(Features(), Features(), num_negatives=512, n_hard=32, counts=(200,) * 6)
    draws = method.draw(losses["q"] @ losses["queue"], 256)
    for query, hard in enumerate(losses["hard_indices"].tolist()):
        for columns in draws.columns:
            assert set(columns[query].tolist()) <= set(hard)
        assert set(torch.cat([c[query] for c in draws.columns]).tolist()) == set(hard)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.tuples(*[st.integers(0, 5)] * 6),
    sigma=st.floats(0, 1),
    delta=st.floats(0, 1),
    eta=st.floats(0, 1),
)
def test_closed_forms_equal_vectors_and_their_gradients(seed, counts, sigma, delta, eta):
    torch.manual_seed(seed)
    method = SynCo(
        Features(),
        Features(),
        num_negatives=40,
        n_hard=10,
        counts=counts,
        sigma=sigma,
        delta=delta,
        eta=eta,
    )
    q = F.normalize(torch.randn(3, 256), dim=1).requires_grad_()
    queue = method.queue1
    draws = method.draw((q @ queue).detach(), 256)
    closed = method.synthetic(q, q @ queue, queue, draws)
    plain = [torch.einsum("bd,bnd->bn", q, v) for v in materialised(q, queue, draws, method)]
    weights = [torch.randn_like(v) for v in plain]
    for one, other, n in zip(closed, plain, counts, strict=True):
        assert one.shape == (3, n)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    if sum(counts):
        totals = [
            sum((w * v).sum() for w, v in zip(weights, x, strict=True)) for x in (closed, plain)
        ]
        one, other = (torch.autograd.grad(t, q, retain_graph=True)[0] for t in totals)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_coefficients_stay_in_their_ranges_and_noise_is_normal():
    torch.manual_seed(0)
    method = SynCo(Features(), Features(), num_negatives=64, n_hard=8, counts=(500,) * 6)
    draws = method.draw(torch.randn(4, 64), 256)
    for uniform in draws.uniform:
        assert uniform.min() >= 0 and uniform.max() < 1
        assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(draws.normal.mean()) < 0.01 and abs(draws.normal.std() - 1) < 0.01


@pytest.mark.parametrize(("epoch", "more"), [(29, 0), (30, 21), (100, 21), (101, 0)])
def test_window_of_epochs(epoch, more):
    method = SynCo(Features(), Features(), num_negatives=64, n_hard=8, counts=(1, 2, 3, 4, 5, 6))
    q = F.normalize(torch.randn(2, 256), dim=1)
    negatives = method.negatives(q, q @ method.queue1, method.queue1, epoch)
    assert torch.cat(negatives, 1).shape == (2, 64 + more)
    assert [n.shape[1] for n in negatives[1:]] == ([1, 2, 3, 4, 5, 6] if more else [])


def test_byol_equals_the_published_loss(losses):
    q, k = losses["q"], losses["k"]
    output = BYOL(Features(), Features()).loss(q, q, k, k, 0)
    torch.testing.assert_close(output.loss, losses["byol_half_loss"], **TOLERANCE)


def test_byol_pairs_the_views():
    """Each query meets the key of the other view."""
    q1, q2, k1, k2 = torch.eye(4)[:, None]
    loss = BYOL(Features(), Features()).loss
    assert loss(q1, q2, k1, k2, 0).loss == 2
    assert loss(q1, q2, q2, k2, 0).loss == 1  # q2 agrees with k1
    assert loss(q1, q2, k1, q1, 0).loss == 1  # q1 agrees with k2


def test_moby_pairs_the_views_and_their_queues():
    method = MoBY(Features(), Features(), num_negatives=4)
    torch.manual_seed(0)
    q1, q2, k1, k2 = F.normalize(torch.randn(4, 5, 256), dim=2)

    def cross_entropy(q, k, queue):
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.2
        return -F.log_softmax(logits, 1)[:, 0].mean()

    expected = cross_entropy(q1, k2, method.queue2) + cross_entropy(q2, k1, method.queue1)
    torch.testing.assert_close(method.loss(q1, q2, k1, k2, 0).loss, expected)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_keys_carry_no_gradient_and_queries_do(name):
    method = METHODS[name](Features(), Features())
    method(torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4), epoch=30).loss.backward()
    for part, learns in (("encoder", 1), ("projector", 1), ("predictor", 1),
                         ("encoder_k", 0), ("projector_k", 0)):  # fmt: skip
        for parameter in getattr(method, part).parameters():
            assert parameter.requires_grad == bool(learns)
            assert (parameter.grad is not None) == bool(learns)


def test_key_encoder_follows_before_it_encodes():
    method = BYOL(Features(), Features())
    with torch.no_grad():
        for parameter in [*method.encoder.parameters(), *method.projector.parameters()]:
            parameter.add_(1)
    before = {n: p.clone() for n, p in method.named_parameters()}
    buffers = {n: b.clone() for n, b in method.named_buffers()}
    method.update_key_encoder(0.9)
    for name, parameter in method.named_parameters():
        part, rest = name.split(".", 1)
        if part.endswith("_k"):
            expected = 0.9 * before[name] + 0.1 * before[f"{part[:-2]}.{rest}"]
            torch.testing.assert_close(parameter, expected)
        else:
            assert parameter.equal(before[name])
    assert all(b.equal(buffers[n]) for n, b in method.named_buffers())


def test_momentum_schedule_is_the_published_one():
    expected = reference("schedules.json")["lr_after_step_update"]["momentum_0.99"]
    assert [key_momentum(0.99, t, 140) for t in range(140)] == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 12), batches=st.lists(st.integers(1, 12), max_size=6))
def test_queue_keeps_the_newest_keys(length, batches):
    method = MoBY(Features(), Features(), num_negatives=length)
    expected = [c.clone() for c in method.queue1.T]
    position = 0
    for number, size in enumerate(batches):
        keys = torch.randn(size, 256) + number
        if size > length:
            before = method.queue1.clone()
            with pytest.raises(ValueError, match="do not fit"):
                method.enqueue(keys, -keys, MADE)
            assert method.queue1.equal(before)
            continue
        method.enqueue(keys, -keys, MADE)
        for key in keys:
            expected[position] = key
            position = (position + 1) % length
    assert method.queue1.T.equal(torch.stack(expected))
    assert int(method.queue_ptr) == position
    touched = (method.queue2 == -method.queue1).all(0)
    assert int(touched.sum()) >= min(length, sum(s for s in batches if s <= length))


def test_keys_of_an_update_that_was_not_made_are_not_kept():
    method = MoBY(Features(), Features(), num_negatives=5)
    method.enqueue(*torch.ones(2, 3, method.dim), MADE)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.enqueue(*torch.full((2, 4, method.dim), torch.nan), ~MADE)
    for name, value in method.state_dict().items():
        assert value.equal(before[name]), name


def test_queues_start_as_unit_noise_alike_everywhere():
    queues = []
    for _ in range(2):
        torch.manual_seed(5)
        queues.append(MoBY(Features(), Features(), num_negatives=64))
    assert queues[0].queue1.equal(queues[1].queue1)
    torch.testing.assert_close(queues[0].queue1.norm(dim=0), torch.ones(64))
    assert not queues[0].queue1.equal(queues[0].queue2)


def test_keys_lie_side_by_side_also_after_a_checkpoint():
    method = MoBY(Features(), Features(), num_negatives=8)
    published = {name: value.contiguous() for name, value in method.state_dict().items()}
    method.load_state_dict(published)
    method.enqueue(*torch.ones(2, 3, method.dim), MADE)
    for queue in (method.queue1, method.queue2):
        assert queue.shape == published["queue1"].shape == (method.dim, 8)
        assert queue.T.is_contiguous()


@pytest.mark.parametrize(("layers", "out"), [(0, 8), (1, 256), (2, 256), (3, 256)])
def test_heads(layers, out):
    head = MLPHead(8, num_layers=layers)
    assert head(torch.randn(4, 8)).shape == (4, out) == (4, head.out_dim)
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == layers
    assert all(m.out_features == 4096 for m in linears[:-1])


@pytest.mark.parametrize("name", ["moby", "byol"])
def test_wrapper_names_are_the_published_ones(name):
    shapes = reference("state_dict.json")[f"{name}_wrapper"]
    method = METHODS[name](Features(), Features())
    own = {n: list(v.shape) for n, v in method.state_dict().items()}
    assert {n: s for n, s in own.items() if not n.startswith("encoder")} == shapes
    method.load_state_dict(method.state_dict() | {n: torch.ones(s) for n, s in shapes.items()})
    assert method.projector_k.linear_out.weight.eq(1).all()


@pytest.mark.parametrize(("name", "millions"), [("synco_vit_large", 303), ("synco_vit_huge", 630)])
def test_a_recipe_of_a_large_encoder(name, millions):
    """Its settings are those of the others, and activations are recomputed."""
    config, small = load_config(name), load_config("synco_vit_small")
    assert name == f"synco_{config.MODEL.ENCODER}" and config.TRAIN.USE_CHECKPOINT
    different = {"ENCODER", "NAME"}
    assert {k: v for k, v in config.MODEL.items() if k not in different} == {
        k: v for k, v in small.MODEL.items() if k not in different
    }
    with torch.device("meta"):
        encoder = create_encoder(config.MODEL.ENCODER, use_checkpoint=True)
    assert encoder.grad_checkpointing
    assert sum(p.numel() for p in encoder.parameters()) // 10**6 == millions


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_builds_runs_and_reloads(path):
    config = load_config(str(path), ["DATA.IMG_SIZE", "32", "MODEL.WARMUP_EPOCHS", "0"])
    torch.manual_seed(0)
    method = build_method(config).train()
    views = torch.randn(2, 2, 3, 32, 32)
    output = method(*views, epoch=0)
    output.loss.backward()
    assert output.loss.isfinite()
    learning = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning.values())
    state = {n: v.clone() for n, v in method.state_dict().items()}
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
    method.load_state_dict(state)
    assert all(v.equal(state[n]) for n, v in method.state_dict().items())


def test_one_pass_for_both_views_equals_two():
    torch.manual_seed(0)
    method = BYOL(create_encoder("vit_nano", img_size=32), create_encoder("vit_nano", img_size=32))
    views = torch.randn(2, 4, 3, 32, 32)
    together = method(*views, epoch=0).loss
    method.views_apart = True
    torch.testing.assert_close(method(*views, epoch=0).loss, together)


def test_batch_norm_in_the_encoder_sees_each_view_by_itself():
    encoders = [create_encoder("vit_nano", 32, replace_ln_with_bn=True) for _ in range(2)]
    assert BYOL(*encoders).views_apart


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_losses_leave_autocast(dtype):
    method = MoBY(Features(), Features(), num_negatives=64)
    views = torch.randn(2, 8, 3, 4, 4)
    with torch.autocast("cpu", dtype):
        output = method(*views, epoch=0)
    assert output.loss.dtype == torch.float32
    assert all(k.dtype == torch.float32 for k in output.keys)
    torch.testing.assert_close(output.keys[0].norm(dim=1), torch.ones(8))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.TYPE", "dino"], "MODEL.TYPE 'dino' is unknown, choose from byol, moby, synco"),
        (["MODEL.TYPE", "sync"], r"MODEL.TYPE 'sync' is unknown, did you mean synco\?"),
        (["MODEL.N_HARD", "9999"], "n_hard must be from 1 to the queue's 4096"),
        (["MODEL.N3", "-1"], "counts must be six numbers"),
        (["MODEL.CONTRAST_TEMPERATURE", "0"], "temperature"),
        (["MODEL.PROJ_NUM_LAYERS", "-1"], "num_layers must not be negative"),
    ],
)
def test_mistakes_are_named(opts, message):
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), ["DATA.IMG_SIZE", "32", *opts])
    with pytest.raises(UserError, match=message):
        build_method(config)


def test_what_a_method_reports():
    """Accuracy and similarities, by hand: unit queries and keys of two images in the plane."""
    angle = torch.tensor([0.0, 0.6, 1.5, 2.8])
    q1, q2, k1, k2 = (
        torch.stack([(angle + a).cos(), (angle + a).sin()], 1)[:2] for a in (0.0, 0.1, 0.9, -0.25)
    )
    cosine = torch.cos
    byol = BYOL(Features(), Features()).loss(q1, q2, k1, k2, 0)
    # angles: 0, 0.6 against -0.25, 0.35, both nearest to their own; 0.1, 0.7 against 0.9, 1.5
    assert float(byol.accuracy) == (1 + 1 / 2) / 2
    expected = (cosine(torch.tensor(0.25)) + cosine(torch.tensor(0.8))) / 2
    assert float(byol.positive) == pytest.approx(float(expected), abs=1e-6)
    assert byol.keys[0] is k1 and byol.keys[1] is k2

    moby = MoBY(Features(), Features(), num_negatives=3)
    far, near = torch.tensor([3.0, 3.1, 3.2]), torch.tensor([-0.6, 3.1, 3.2])
    moby.queue1 = torch.stack([near.cos(), near.sin()])  # 0.7 and 1.3 from the queries of q2
    moby.queue2 = torch.stack([far.cos(), far.sin()])
    found = moby.loss(q1, q2, k1, k2, 0)
    assert float(found.accuracy) == (1 + 1 / 2) / 2  # the own keys are 0.8 away
    assert float(found.positive) == pytest.approx(float(expected), abs=1e-6)


def test_spread_needs_two_images():
    unit = F.normalize(torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    q, k = unit
    both = spread_figures((q, q), (k, k), ())
    expected = ((q[0] @ k[1]) + (q[1] @ k[0])) / 2
    torch.testing.assert_close(both["negative"], expected)
    torch.testing.assert_close(both["feature_std"], q.std(0).mean())
    assert spread_figures((q[:1], q[:1]), (k[:1], k[:1]), ()) == {}
    queues = (F.normalize(torch.randn(4, 6), dim=0),) * 2
    assert set(spread_figures((q[:1], q[:1]), (k[:1], k[:1]), queues)) == {"negative"}
    with torch.autocast("cpu", torch.bfloat16):
        within = spread_figures((q, q), (k, k), queues)
    torch.testing.assert_close(within, spread_figures((q, q), (k, k), queues), rtol=0, atol=0)


def test_defaults_are_the_papers():
    """SynCo (arXiv 2410.02401) and MoBY (arXiv 2105.04553), as in the published configuration."""
    synco = SynCo(Features(), Features())
    assert synco.counts == (128,) * 6 and synco.n_hard == 256
    assert (synco.warmup_epochs, synco.cooldown_epochs) == (30, 100)
    assert (synco.alpha, synco.beta, synco.gamma) == ((0.0, 0.5), (1.0, 1.5), (0.0, 1.0))
    assert (synco.sigma, synco.delta, synco.eta) == (0.1, 0.01, 0.01)
    for method in (synco, MoBY(Features(), Features()), BYOL(Features(), Features())):
        for head, layers in ((method.projector, 2), (method.predictor, 2)):
            assert sum(isinstance(m, nn.Linear) for m in head.modules()) == layers
        assert method.dim == 256
        if method.queues():
            assert method.temperature == 0.2 and method.queue1.shape == (256, 4096)


def test_the_smallest_settings_are_accepted():
    moby = MoBY(Features(), Features(), num_negatives=1)
    assert moby.queue1.shape == (256, 1)
    synco = SynCo(Features(), Features(), num_negatives=1, n_hard=1, counts=(0, 0, 0, 0, 0, 1))
    q, k = F.normalize(torch.randn(2, 3, 256), dim=2)
    assert synco.loss(q, q, k, k, 50).loss.isfinite()
    for wrong in ({"num_negatives": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="must be positive"):
            MoBY(Features(), Features(), **wrong)
    for wrong in (
        {"n_hard": 0},
        {"n_hard": 2},
        {"counts": (1,) * 5},
        {"counts": (1, 1, 1, 1, 1, -1)},
    ):
        with pytest.raises(ValueError, match=r"n_hard must be from|counts must be six"):
            SynCo(Features(), Features(), num_negatives=1, **({"n_hard": 1} | wrong))


def by_lists(tensor):
    """As it was gathered before: the rows of each process in a list."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def train_twelve_updates(rank, folder):
    """The state after two micro-batches an update, with the gathers of now and by lists."""
    opts = ["MODEL.ENCODER", "vit_nano", "DATA.IMG_SIZE", "16", "MODEL.WARMUP_EPOCHS", "0"]
    opts += ["MODEL.CONTRAST_NUM_NEGATIVE", "32", "MODEL.N_HARD", "8"]
    opts += ["MODEL.REPLACE_LN_WITH_BN", "True"]  # its gradient crosses the processes
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), opts)
    found = []
    for gather in (None, by_lists):
        with pytest.MonkeyPatch.context() as patch:
            if gather:
                patch.setattr("models.batch_norm.all_gather_rows", gather)
                patch.setattr("models.moby.all_gather_batch", gather)
            torch.manual_seed(0)
            model = synchronize_batch_norm(build_method(config), torch.device("cpu"))
            optimizer = build_optimizer(config, model, 1e-3)
            parallel = data_parallel(model, torch.device("cpu"))
            torch.manual_seed(rank)
            for number in range(12):
                model.update_key_encoder(0.9)
                keys = []
                for _ in range(2):
                    output = parallel(*torch.randn(2, 2, 3, 16, 16), 1)
                    output.loss.backward()
                    keys.append(output.keys)
                optimizer.step()
                optimizer.zero_grad()
                for pair in keys:
                    model.enqueue(*pair, torch.tensor(number != 5))
        found.append(model.state_dict())
    torch.save(found, f"{folder}/{rank}.pth")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_all_state_is_equal_over_ranks_and_however_it_is_gathered(tmp_path, processes):
    spawn(train_twelve_updates, processes, str(tmp_path))
    states = [s for rank in range(processes) for s in torch.load(tmp_path / f"{rank}.pth")]
    for state in states[1:]:
        for name, value in states[0].items():
            assert state[name].equal(value), name
    assert states[0]["queue_ptr"] == 11 * 2 * 2 * processes % 32
