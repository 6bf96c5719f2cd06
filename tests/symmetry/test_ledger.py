"""Ledgers against nullities known by theory and against dense ones computed here."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import (
    Attention,
    at_own_outputs,
    cross_entropy,
    dense_nullity,
    half_squared_error,
    mlp,
    normal,
    seeded,
    switching,
)
from torch import Tensor, nn

import phasewatch
from phasewatch.estimators import SymmetryLedger
from phasewatch.objective import Objective
from phasewatch.symmetry import NON_GENERIC_KINDS, ZeroLedger, explain_zeros


def account(module: nn.Module, inputs: Tensor, nullity: int | None = None, **kinds: int) -> ZeroLedger:
    """The ledger, after its sum is seen to be the theory's and the dense nullity, and its kinds those expected."""
    ledger = explain_zeros(module, at_own_outputs(module, inputs))
    dense = dense_nullity(module, inputs)
    assert nullity is None or dense == nullity
    assert ledger.certified == ledger.nullity == dense, ledger.table()
    assert ledger.unexplained == 0
    assert ledger.unknown == ()
    assert ledger.generic + sum(ledger.non_generic.values()) == dense
    for kind in ("generic", *NON_GENERIC_KINDS):
        expected = kinds.get(kind.replace(" ", "_"), 0)
        if kinds:
            assert (ledger.generic if kind == "generic" else ledger.non_generic[kind]) == expected, ledger.table()
    return ledger


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize("widths", [(5, 9, 4), (4, 7, 6, 3)])
def test_rescaling(widths: tuple[int, ...], activation: type[nn.Module]) -> None:
    inputs = normal(400, widths[0])
    module = switching(inputs, *widths, activation=activation)
    account(module, inputs, sum(widths[1:-1]), generic=sum(widths[1:-1]))


def test_what_the_functional_interface_computes_is_followed_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu_(self.first(x.flatten(1))) * 2)

    inputs = normal(300, 4)
    module = Functional()
    module.load_state_dict(
        {
            name.replace("0.", "first.").replace("2.", "second."): value
            for name, value in switching(inputs, 4, 6, 3).state_dict().items()
        }
    )
    account(module.double(), inputs, 6, generic=6)


@pytest.mark.parametrize("widths", [(5, 7, 4), (6, 5, 6, 3)])
def test_softmax_shift(widths: tuple[int, ...]) -> None:
    """At random labels: of the Gauss-Newton matrix both the rescalings and the shift are zeros."""
    inputs = normal(500, widths[0])
    module = switching(inputs, *widths)
    batches = [
        (inputs[:300], torch.arange(300) % widths[-1]),
        (inputs[300:], torch.arange(200) % widths[-1]),
    ]
    ledger = explain_zeros(module, Objective(module, batches, loss_fn=cross_entropy))
    assert ledger.generic == sum(widths[1:-1]) + widths[-2] + 1
    assert sum(f.dimensions for f in ledger.of_kind("softmax")) == widths[-2] + 1
    assert ledger.nullity == ledger.certified == dense_nullity(module, inputs, softmax=True)


@pytest.mark.parametrize(("inputs", "width", "outputs"), [(4, 7, 3), (6, 5, 2)])
def test_dead_unit(inputs: int, width: int, outputs: int) -> None:
    """d_in + 1 + d_out, of which the rescaling is one."""
    x = normal(400, inputs)
    module = switching(x, inputs, width, outputs)
    module[0].bias.data[2] = -100.0
    ledger = account(module, x, width - 1 + inputs + 1 + outputs, generic=width, dead=inputs + outputs)
    assert ledger.of_kind("dead")[0].units == ((2,),)
    assert ledger.of_kind("dead")[0].layer == "0"


def test_always_on_units() -> None:
    """k^2 + k in place of k."""
    x = normal(400, 4)
    module = switching(x, 4, 8, 5)
    module[0].bias.data[[1, 5, 6]] = 20.0
    ledger = account(module, x, 8 + 9, generic=8, always_on=9)
    assert ledger.of_kind("always on")[0].units == ((1, 5, 6),)


@pytest.mark.parametrize(("slopes", "linear"), [(1, 1), (6, 2)])
def test_slopes_that_are_learnt(slopes: int, linear: int) -> None:
    """A factor of each unit; of one that is negative everywhere a shift, and a factor against a slope of its own."""
    x = normal(400, 4)
    module = seeded(nn.Sequential(nn.Linear(4, 6), nn.PReLU(slopes), nn.Linear(6, 3)))
    account(module, x, 6, generic=6)
    module[0].bias.data[2] = -20.0
    ledger = account(module, x, 6 + linear, generic=6, always_on=linear)
    assert {finding.units for finding in ledger.of_kind("always on")} == {((2,),)}


@pytest.mark.parametrize("outputs", [1, 4])
def test_tanh_units(outputs: int) -> None:
    inputs = 5
    x = normal(300, inputs)

    def net() -> nn.Sequential:
        return seeded(mlp(inputs, 6, outputs, activation=nn.Tanh))

    assert account(net(), x, 0).findings == ()

    module = net()
    module[2].weight.data[:, 3] = 0
    ledger = account(module, x, inputs + 1, zero_outgoing=inputs + 1)
    assert ledger.findings[0].units == ((3,),)

    module = net()
    module[0].weight.data[3] = 0
    ledger = account(module, x, outputs + 1, zero_incoming=outputs + 1)
    assert ledger.findings[0].units == ((3,),)

    module = net()
    module[0].weight.data[3] = -module[0].weight.data[1]
    module[0].bias.data[3] = -module[0].bias.data[1]
    cancelling = inputs + 1 if outputs == 1 else 0
    ledger = account(module, x, outputs + cancelling, parallel=outputs, annihilating=cancelling)
    assert ledger.findings[0].units == ((1, 3),)
    distance, units = ledger.closeness[0].distances["parallel"]
    assert distance == pytest.approx(0.0, abs=1e-12) and units == (1, 3)

    module[2].weight.data[:, 3] = 0.7 * module[2].weight.data[:, 1]
    ledger = account(module, x, outputs + inputs + 1, parallel=outputs, annihilating=inputs + 1)
    assert ledger.of_kind("annihilating")[0].units == ((1, 3),)


def test_zero_outgoing_and_constant_in_an_inner_layer() -> None:
    """The unit of the first layer feeds only what has no effect itself; the second has a dead unit."""
    x = normal(400, 4)
    module = seeded(mlp(4, 6, 5, 3, activation=nn.Tanh))
    module[2].weight.data[:, 1] = 0
    module[2].weight.data[4] = 0
    ledger = account(module, x, 5 + 3 + 1, zero_outgoing=5, zero_incoming=4)
    assert {(f.kind, f.layer, f.units) for f in ledger.findings} == {
        ("zero outgoing", "0", ((1,),)),
        ("zero incoming", "2", ((4,),)),
    }


def test_relu_pair_that_points_the_same_way() -> None:
    """Positively parallel: the outgoing weights can move from one to the other, in place of nothing."""
    x = normal(400, 5)
    module = switching(x, 5, 6, 4)
    module[0].weight.data[2] = 1.7 * module[0].weight.data[0]
    module[0].bias.data[2] = 1.7 * module[0].bias.data[0]
    ledger = account(module, x)
    assert ledger.generic == 6
    assert ledger.of_kind("parallel")[0].units == ((0, 2),)
    assert ledger.non_generic["parallel"] == 4


def test_dead_pixels() -> None:
    """Inputs that are always zero: their weights into every unit do nothing."""
    x = normal(400, 6)
    x[:, [1, 4]] = 0.0
    module = seeded(mlp(6, 5, 3, activation=nn.Tanh))
    account(module, x, 2 * 5, data_rank=10)


def test_few_samples() -> None:
    """#alive + sum over units of what their active samples leave free + k^2 for equal patterns; here against dense."""
    for seed in range(4):
        x = normal(26, 5, seed=seed)
        module = seeded(mlp(5, 6, 8, activation=nn.ReLU), seed, scale=1.0)
        account(module, x)


@pytest.mark.parametrize(
    ("widths", "ranks", "input_rank"),
    [((7, 5, 6), (5, 5), 7), ((6, 4, 7, 5), (3, 2, 4), 5), ((9, 3, 8), (3, 3), 6), ((4, 6, 6, 3), (1, 5, 2), 4)],
)
def test_deep_linear_net(widths: tuple[int, ...], ranks: tuple[int, ...], input_rank: int) -> None:
    """N - [sum a_i b_i - sum a_i b_{i+1}], also for weights and data that are rank deficient."""
    module = mlp(*widths, activation=nn.Identity, bias=False)
    weights = list(module.parameters())
    for i, (weight, rank) in enumerate(zip(weights, ranks, strict=True)):
        rows, columns = weight.shape
        weight.data.copy_(normal(rows, rank, seed=3 * i + 1) @ normal(rank, columns, seed=3 * i + 2))
        weight.data /= (rows * columns) ** 0.5
    x = normal(40, input_rank, seed=20) @ normal(input_rank, widths[0], seed=21)
    depth = len(weights)

    def rank(*factors: Tensor) -> int:
        return int(torch.linalg.matrix_rank(torch.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]))

    after = [rank(*weights[:i:-1]) if i + 1 < depth else widths[-1] for i in range(depth)]
    before = [rank(*weights[:i][::-1], x.T) if i else rank(x) for i in range(depth)]
    total = sum(a * b for a, b in zip(after, before, strict=True))
    total -= sum(a * b for a, b in zip(after, before[1:], strict=False))
    account(module, x, sum(w.numel() for w in weights) - total)


def test_biases_between_linear_layers() -> None:
    """The change of basis, and the shift of the hidden units: h^2 + h."""
    account(mlp(7, 4, 6, activation=nn.Identity), normal(60, 7), 4 * 4 + 4, generic=20)


@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm(width: int, affine: bool) -> None:
    """Before the norm what all units get alike and the scale, behind it its centring; rotations in between.

    (d_in + 1) + 1, and d_out, and O(width - 1) where the span of the inputs does not cut it; with affine parameters
    2 width more. Without bias in the norm the sum rule needs none.
    """
    x = normal(300, width + 1)
    module = seeded(
        nn.Sequential(
            nn.Linear(width + 1, width),
            nn.LayerNorm(width, eps=0.0, elementwise_affine=affine),
            nn.Linear(width, 3),
        )
    )
    rotations = (width - 1) * (width - 2) // 2
    expected = (width + 2) + 1 + 3 + rotations + 2 * width * affine
    ledger = account(module, x, expected, generic=expected)
    assert {finding.kind for finding in ledger.findings} == {"norm"}


def test_layer_norm_before_relu() -> None:
    """Per unit the affine parameters against the outgoing weights, and (d_in + 1) + 1."""
    x = normal(400, 5)
    for seed in range(200):
        module = seeded(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6, eps=0.0), nn.ReLU(), nn.Linear(6, 3)), seed)
        share = (module[:3](x) > 0).double().mean(0)
        if share.min() > 0.1 and share.max() < 0.9:
            break
    account(module, x, 6 + 6 + 1, generic=13)


def test_epsilon_of_a_norm_breaks_its_scale_and_is_named() -> None:
    x = normal(300, 5)
    module = seeded(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6, eps=1e-5), nn.Tanh(), nn.Linear(6, 3)))
    ledger = explain_zeros(module, at_own_outputs(module, x))
    assert ledger.generic == 6  # what all units get alike, but not the scale
    assert any(text.startswith("norm of 0") for text in ledger.broken)


def test_rms_norm_scale_and_rotations() -> None:
    x = normal(300, 6)
    module = seeded(nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5, eps=0.0, elementwise_affine=False), nn.Linear(5, 4)))
    account(module, x, 1 + 10, generic=11)


@pytest.mark.parametrize(("inputs", "width", "bias"), [(2, 7, True), (3, 9, False), (2, 5, False)])
def test_more_units_than_a_root_mean_square_has_coefficients(inputs: int, width: int, bias: bool) -> None:
    """Scales of units, with their weights in the norm, keep the quadratic form up to a factor."""
    columns = inputs + bias
    layers = [nn.Linear(inputs, width, bias=bias), nn.RMSNorm(width, eps=0.0), nn.Tanh(), nn.Linear(width, 2)]
    nullity = 1 + width - columns * (columns + 1) // 2
    account(seeded(nn.Sequential(*layers), 4), normal(300, inputs), nullity, generic=nullity)


def test_more_units_than_a_standard_deviation_has_coefficients() -> None:
    """As for RMSNorm, and the scales must keep the mean; besides the norm's scale and the shifts of all units."""
    layers = [nn.Linear(2, 9, bias=False), nn.LayerNorm(9, eps=0.0), nn.Tanh(), nn.Linear(9, 2)]
    nullity = 1 + 2 + 9 - 3 - 2
    account(seeded(nn.Sequential(*layers), 4), normal(300, 2), nullity, generic=nullity)


def test_a_norm_behind_a_norm_forgets_the_first() -> None:
    """Only ratios count behind a homogeneous function, so that the first norm may be anything."""
    layers = [nn.Linear(4, 6), nn.RMSNorm(6, eps=0.0), nn.LeakyReLU(0.3), nn.Linear(6, 5, bias=False)]
    layers += [nn.RMSNorm(5, eps=0.0), nn.Tanh(), nn.Linear(5, 2)]
    # unit by unit behind the first norm, the scale of all, that of each unit against the norm's weight, the second norm
    account(seeded(nn.Sequential(*layers), 3), normal(400, 4), 6 + 1 + 5 + 1, generic=13)


@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_batch_norm_without_activation_is_one_more_linear_layer(affine: bool, bias: bool) -> None:
    """The product of two linear layers through 4 units, the scales and shifts of the norm, and those of ReLU units."""
    inputs = normal(400, 6)
    layers = [nn.Linear(6, 4, bias=bias), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)]
    nullity = 4**2 + 4 * bias + 8 * affine
    account(seeded(nn.Sequential(*layers), 2), inputs, nullity, generic=nullity)


def test_layer_norm_before_a_layer_without_bias() -> None:
    """Its rotations and the sum of what it writes, with its bias in place of the layer's."""
    layers = [nn.Linear(5, 4), nn.LayerNorm(4, eps=0.0), nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2)]
    # scale, what all units get alike, rotations of three dimensions, weights against the layer's, multiples of the sum,
    # and the bias that the layer does not see
    account(seeded(nn.Sequential(*layers), 2), normal(400, 5), 1 + 6 + 3 + 4 + 3 + 1, generic=18)


def test_batch_norm_between_layers_without_bias() -> None:
    """Its bias is the only one, and takes up what the changes of basis of its 4 units leave."""
    layers = [nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2)]
    account(seeded(nn.Sequential(*layers), 2), normal(400, 6), 4**2 + 4, generic=20)


def test_batch_norm_without_weights_before_relu() -> None:
    inputs = normal(600, 4)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.LeakyReLU(), nn.Linear(6, 3)]
    account(seeded(nn.Sequential(*layers), 1), inputs, 6, generic=6)


def test_constants_pass_a_layer_without_bias() -> None:
    """Change of basis of 4 units, their constants into the norm's, and the norm's scale of each of 5 units."""
    layers = [nn.Linear(6, 4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)]
    account(seeded(nn.Sequential(*layers), 2), normal(400, 6), 4**2 + 4 + 5, generic=25)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize(("inputs", "heads", "head", "outputs"), [(6, 2, 3, 6), (7, 1, 4, 5)])
def test_attention(inputs: int, heads: int, head: int, outputs: int, bias: bool, by_hand: bool) -> None:
    module = seeded(Attention(inputs, heads, head, outputs, bias, by_hand=by_hand))
    nullity = heads * (2 * head**2 + 2 * head * bias)
    account(module, normal(30, 5, inputs), nullity, generic=nullity)


@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(bias: bool) -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, bias=bias, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    module = seeded(SelfAttention())
    nullity = 2 * (2 * 3**2 + 2 * 3 * bias)
    account(module, normal(40, 5, 6), nullity, generic=nullity)


def test_grouped_heads() -> None:
    """One change of basis of queries and keys, and one of values, for each key/value head."""
    module = seeded(Attention(7, 4, 3, 6, bias=False, key_heads=2))
    account(module, normal(40, 5, 7), 2 * 2 * 3**2, generic=36)


def test_rotary_embeddings() -> None:
    """Queries and keys: d_h, values: d_h^2."""
    module = seeded(Attention(7, 2, 4, 6, bias=False, rotary=True))
    account(module, normal(40, 6, 7), 2 * (4 + 16), generic=40)


def _switching_convnet(inputs: Tensor, make: Callable[[], nn.Sequential]) -> nn.Sequential:
    for seed in range(500):
        module = seeded(make(), seed, scale=1.0)
        hidden, shares = inputs, []
        for layer in module:
            if isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
                shares.append((hidden > 0).double().transpose(0, 1).flatten(1).mean(1))
            hidden = layer(hidden)
        share = torch.cat(shares)
        if share.min() > 0.1 and share.max() < 0.9:
            return module
    raise AssertionError("no such net among 500")


def test_convolutions_through_batch_norm_and_pooling() -> None:
    """Linear to BatchNorm is scale and shift, then one rescaling: 3 a channel; 1 a channel without the norm."""
    inputs = normal(150, 2, 6, 6)
    module = _switching_convnet(
        inputs,
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(3, 4, 2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(16, 3)),
        ),
    )
    ledger = account(module, inputs, 3 * 3 + 4, generic=13)
    assert {(f.layer, f.dimensions) for f in ledger.findings} >= {("4", 4)}


@pytest.mark.parametrize("padding", ["valid", "same", 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_along_one_axis(padding: str | int, dilation: int) -> None:
    """One rescaling a channel, however the ends are padded."""
    inputs = normal(200, 2, 9)
    module = seeded(
        nn.Sequential(
            *(nn.Conv1d(2, 4, 3, padding=padding, dilation=dilation), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool1d(1)),
            *(nn.Flatten(), nn.Linear(4, 5)),
        )
    )
    account(module, inputs, 4, generic=4)


@pytest.mark.parametrize(
    ("between", "read"),
    [
        (nn.ChannelShuffle(2), 4),
        (nn.PixelUnshuffle(2), 16),
        (nn.Upsample(scale_factor=2), 4),
        (nn.Upsample(size=7, mode="bilinear"), 4),  # its averages of one code differ by rounding
    ],
)
def test_channels_that_are_moved_or_resized(between: nn.Module, read: int) -> None:
    """One rescaling a channel, wherever it goes and however often it is read."""
    inputs = normal(30, 2, 4, 4)
    module = seeded(nn.Sequential(nn.Conv2d(2, 4, 1), nn.LeakyReLU(0.2), between, nn.Conv2d(read, 2, 1)))
    account(module, inputs, 4, generic=4)


def test_a_maximum_of_several_units_is_not_known() -> None:
    """Two units each share a factor and a shift, which no rule knows: six zeros, and none of a single unit is tried."""

    class Greatest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.amax(-1)

    inputs = normal(200, 4)
    module = seeded(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2)), Greatest(), nn.Linear(3, 3)))
    ledger = explain_zeros(module, at_own_outputs(module, inputs))
    assert ledger.unexplained == ledger.nullity == dense_nullity(module, inputs) == 6
    assert (ledger.broken, ledger.unknown) == ((), ("the function amax after 0",))


def test_a_type_taken_from_units_holds_none() -> None:
    """A mask that is cast to the type of hidden units is no unit of theirs: 6 units of ReLU."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x))
            return self.second(hidden) * (x[:, :1] > -10).type_as(hidden)

    inputs = normal(300, 4)
    module = Masked()
    state = switching(inputs, 4, 6, 3).state_dict()
    module.load_state_dict(
        {
            f"{name}.{kind}": state[f"{i}.{kind}"]
            for name, i in (("first", 0), ("second", 2))
            for kind in ("weight", "bias")
        }
    )
    account(module.double(), inputs, 6, generic=6)


def test_residual_stream_without_norm() -> None:
    """Change of basis of the stream d^2, its shift d, and d more between the biases of stem and branch."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.unembed = nn.Linear(5, 4), nn.Linear(4, 4)
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.embed(x)
            return self.unembed(hidden + self.down(torch.tanh(self.up(hidden))))

    ledger = account(seeded(Residual()), normal(300, 5), 4**2 + 4 + 4, generic=24)
    assert {f.kind: f.dimensions for f in ledger.findings} == {"change of basis": 20, "redundant bias": 4}


def test_embedding_of_tokens_that_do_not_occur() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.last = nn.Embedding(9, 3), nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(self.embed(tokens).flatten(1))))

    tokens = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    module = seeded(Tokens())
    ledger = explain_zeros(module, at_own_outputs(module, tokens))
    assert ledger.certified == ledger.nullity == dense_nullity(module, tokens)
    assert sum(f.dimensions for f in ledger.of_kind("data rank") if f.layer == "embed") == 2 * 3


def test_unknown_architecture_is_said_to_be_unknown() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cumsum(self.first(x), dim=-1))

    x = normal(100, 4)
    module = seeded(Unknown())
    ledger = explain_zeros(module, at_own_outputs(module, x))
    assert any("cumsum" in text for text in ledger.unknown)
    assert ledger.unexplained == ledger.nullity - ledger.certified > 0
    assert "not known" in ledger.table()


def test_rotations_that_are_too_many_are_named_and_not_just_unexplained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five units before an RMSNorm turn in 5 * 4 / 2 planes; the ledger that leaves them out says so."""
    layers = [nn.Linear(6, 5), nn.RMSNorm(5, eps=0.0), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)]
    x = normal(400, 6)
    module = seeded(nn.Sequential(*layers), 4)
    whole = account(module, x, 1 + 10 + 5, generic=16)
    assert whole.unknown == ()
    monkeypatch.setattr("phasewatch.symmetry.generic.MOST_ENTRIES", 100)
    ledger = explain_zeros(module, at_own_outputs(module, x))
    assert (ledger.certified, ledger.unexplained, ledger.nullity) == (6, 10, 16)
    assert ledger.unknown == ("the rotations of 0, which are too many",)
    assert "the rotations of 0" in repr(ledger) and "the rotations of 0" in ledger.table()
    reading = SymmetryLedger().read(at_own_outputs(module, x), 400, 0)
    unexplained = reading.estimates["zeros_unexplained"]
    assert unexplained.value == 10
    assert unexplained.doubts == ("not known: the rotations of 0, which are too many",)


def test_rotations_that_a_weight_of_zero_does_not_let_through_are_named() -> None:
    layers = [nn.Linear(6, 5), nn.RMSNorm(5, eps=0.0), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)]
    module, x = seeded(nn.Sequential(*layers), 4), normal(400, 6)
    with torch.no_grad():
        module[1].weight[2] = 0.0
    ledger = explain_zeros(module, at_own_outputs(module, x))
    assert ledger.nullity == dense_nullity(module, x)
    assert ledger.unexplained == ledger.nullity - ledger.certified > 0
    assert "the rotations of 0" in repr(ledger)


def test_what_is_too_much_to_look_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work may be spent on what the units of a layer do not see: that is said of each of its two layers."""
    monkeypatch.setattr("phasewatch.symmetry.units._MOST_WORK", 0)
    x = normal(400, 4)
    module = switching(x, 4, 6, 3)
    ledger = explain_zeros(module, at_own_outputs(module, x))
    for layer in ("0", "2"):
        assert any(f"what units of {layer} together do not see" in what for what in ledger.unknown)


def outputs_of_zero(case: str) -> nn.Module:
    """A network whose outputs are zero on the probe, whatever its weights: all of its parameters are zeros."""
    widths = {"one layer": (4, 5, 2), "one unit": (4, 1, 2), "two layers": (4, 5, 6, 2)}[case]
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:-1], strict=False)]
    layers = [module for layer in layers for module in (layer, nn.ReLU())]
    module = seeded(nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False)))
    with torch.no_grad():
        for layer in module[:-1:2]:
            layer.bias.fill_(-100.0)
    return module


@pytest.mark.parametrize("dense_below", [0, 1500])
@pytest.mark.parametrize(("case", "parameters"), [("one layer", 35), ("one unit", 7), ("two layers", 73)])
def test_with_all_units_dead_all_is_zero(case: str, parameters: int, dense_below: int) -> None:
    """(4 + 1) 5 + 5 * 2, (4 + 1) + 2 and (4 + 1) 5 + (5 + 1) 6 + 6 * 2, counted and bracketed."""
    module = outputs_of_zero(case)
    x = normal(60, 4)
    for objective in (
        Objective(module, [(x, normal(60, 2, seed=1))], loss_fn=half_squared_error),
        Objective(module, [(x, torch.arange(60) % 2)], loss_fn=cross_entropy),
    ):
        reading = SymmetryLedger(dense_below=dense_below).read(objective, 60, 0)
        for name in ("nullity_ggn", "nullity_ggn_lower", "nullity_ggn_upper", "zeros_certified"):
            assert reading.estimates[name].value == parameters
        assert all(estimate.reliable for estimate in reading.estimates.values())


def test_all_zeros_known_beforehand_leave_nothing_to_search() -> None:
    module = outputs_of_zero("one layer")
    x = normal(60, 4)
    objective = Objective(module, [(x, normal(60, 2, seed=1))], loss_fn=half_squared_error)
    known = explain_zeros(module, objective).zero_space()
    spectrum = phasewatch.hessian_spectrum(objective, "gauss-newton", dense_below=0, known_zeros=known)
    assert (spectrum.nullity, spectrum.largest, spectrum.smallest, spectrum.trace) == (35, 0.0, 0.0, 0.0)
    assert spectrum.converged and spectrum.largest_converged and spectrum.smallest_converged


def test_away_from_a_critical_point_the_hessian_has_less() -> None:
    """The certified directions are zeros of the Gauss-Newton matrix, whatever the gradient."""
    x = normal(400, 4)
    module = switching(x, 4, 6, 3)
    objective = Objective(module, [(x, normal(400, 3, seed=5))], loss_fn=half_squared_error)
    ledger = explain_zeros(module, objective)
    assert (ledger.certified, ledger.nullity, ledger.unexplained) == (6, 6, 0)
    assert phasewatch.hessian_spectrum(objective).nullity == 0


def test_closeness_sees_degeneracy_coming() -> None:
    x = normal(300, 5)
    parallel, outgoing = [], []
    for distance in (1.0, 0.1, 0.01, 0.0):
        module = seeded(mlp(5, 6, 3, activation=nn.Tanh))
        first, last = module[0], module[2]
        first.weight.data[3] = -first.weight.data[1] + distance * first.weight.data[3]
        first.bias.data[3] = -first.bias.data[1] + distance * first.bias.data[3]
        last.weight.data[:, 0] *= distance
        closeness = explain_zeros(module, at_own_outputs(module, x)).closeness[0]
        parallel.append(closeness.distances["parallel"][0])
        outgoing.append(closeness.distances["zero outgoing"][0])
    assert parallel == sorted(parallel, reverse=True)
    assert outgoing == sorted(outgoing, reverse=True)
    assert closeness.distances["parallel"][1] == (1, 3)
    assert closeness.distances["zero outgoing"][1] == (0,)
    assert closeness.exact


def test_a_distance_that_is_not_known_is_left_out() -> None:
    """Of one unit there are no two; tanh has no steepest slope; a norm's own weights are no incoming ones."""
    x = normal(300, 5)
    lone = seeded(mlp(5, 1, 3, activation=nn.Tanh))
    [closeness] = explain_zeros(lone, at_own_outputs(lone, x)).closeness
    assert not {"parallel", "same pattern", "always on"} & set(closeness.distances)
    assert {"zero outgoing", "zero incoming", "constant", "annihilating", "data rank"} <= set(closeness.distances)
    normed = seeded(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    closeness = {c.layer: c for c in explain_zeros(normed, at_own_outputs(normed, x)).closeness}["1"]
    assert "zero incoming" not in closeness.distances and "zero outgoing" in closeness.distances
    assert not closeness.exact


def test_every_kind_has_a_measure_that_names_the_units() -> None:
    """Planted one at a time, almost and then exactly; the share of samples is that of the planted ones."""
    x = normal(400, 4)
    base = switching(x, 4, 6, 3)
    nearly = {
        # a unit that is on for 2 of the samples, one that is off for 2, one that is on where another one is, but for 2
        "dead": lambda first, _, order: first.bias.__setitem__(2, first.bias[2] - (order[2][-3:-1].mean())),
        "always on": lambda first, _, order: first.bias.__setitem__(2, first.bias[2] - (order[2][1:3].mean())),
        "zero incoming": lambda first, *_: first.weight.__setitem__(2, 1e-3 * first.weight[2]),
    }
    for kind, change in nearly.items():
        module = copy.deepcopy(base)
        order = module[0](x).detach().T.sort(dim=1).values
        with torch.no_grad():
            change(module[0], module[2], order)
        distance, units = explain_zeros(module, at_own_outputs(module, x)).closeness[0].distances[kind]
        assert units == (2,)
        if kind == "zero incoming":
            norms = module[0].weight.detach().norm(dim=1)
            assert distance == pytest.approx(float(norms[2] / norms.max()))
        else:
            assert distance == pytest.approx(2 / 400)
    module = copy.deepcopy(base)
    with torch.no_grad():  # the same hyperplane, shifted by as much as takes the sign of two samples
        values = module[0](x).detach()[:, 1]
        above = values[values > 0].sort().values
        module[0].weight[4] = 2 * module[0].weight[1]
        module[0].bias[4] = 2 * (module[0].bias[1] - above[1:3].mean())
    distance, units = explain_zeros(module, at_own_outputs(module, x)).closeness[0].distances["same pattern"]
    assert (distance, units) == (pytest.approx(2 / 400), (1, 4))
    flat = torch.cat([x[:, :3], x[:, :3].sum(1, keepdim=True) + 1e-3 * x[:, 3:]], dim=1)
    distance, _ = explain_zeros(base, at_own_outputs(base, flat)).closeness[0].distances["data rank"]
    features = torch.cat([flat, torch.ones(400, 1, dtype=torch.float64)], dim=1)
    assert distance == pytest.approx(float(torch.linalg.svdvals(features / features.norm(dim=0))[-1]), rel=1e-6)


def test_a_unit_is_nearly_always_on_by_the_steeper_of_its_own_slopes() -> None:
    """The third unit is negative on two of the samples; of the first unit the learnt slope is the steeper one."""
    x = normal(400, 4)
    module = seeded(nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3)))
    module[0].bias.data[2] -= module[0](x).detach()[:, 2].sort().values[1:3].mean()
    module[1].weight.data[:] = torch.tensor([1.5, *[0.2] * 5])
    [closeness] = explain_zeros(module, at_own_outputs(module, x)).closeness
    assert closeness.distances["always on"] == (pytest.approx(2 / 400), (2,))


def test_units_that_nearly_cancel_are_named_with_their_distance() -> None:
    """Two tanh units with near equal weights and one output: their effects differ by no more than the weights do."""
    x = normal(300, 5)
    module = seeded(mlp(5, 6, 1, activation=nn.Tanh))
    first = module[0]
    before = explain_zeros(module, at_own_outputs(module, x))
    assert before.closeness[0].nearly() == {}
    assert "nearly" not in before.table()
    distances = []
    for distance in (3e-2, 3e-3, 3e-4):
        step = distance * normal(5, seed=7)
        first.weight.data[3] = first.weight.data[1] + step
        first.bias.data[3] = first.bias.data[1]
        ledger = explain_zeros(module, at_own_outputs(module, x))
        assert ledger.non_generic["annihilating"] == ledger.non_generic["parallel"] == 0
        found = ledger.closeness[0].nearly(tolerance=0.1)["annihilating"]
        assert found[1] == (1, 3)
        distances.append(found[0])
    assert distances[1] / distances[0] == pytest.approx(0.1, rel=0.3)
    assert distances[2] / distances[1] == pytest.approx(0.1, rel=0.1)
    assert "nearly annihilating" in ledger.table()
    assert ledger.closeness[0].nearly()["parallel"][1] == (1, 3)


def test_same_in_single_precision_and_in_batches() -> None:
    x = normal(400, 4)
    module = switching(x, 4, 7, 3)
    module[0].bias.data[2] = -100.0
    whole = explain_zeros(module, at_own_outputs(module, x))
    for other in (at_own_outputs(module, x, batches=3), at_own_outputs(module.float(), x.float())):
        ledger = explain_zeros(module, other)
        assert ledger.findings == whole.findings


def test_nothing_is_touched() -> None:
    x = normal(300, 4)
    module = switching(x, 4, 6, 3)
    objective = at_own_outputs(module, x)
    before = torch.random.get_rng_state(), [p.clone() for p in module.parameters()], objective.parameters.clone()
    explain_zeros(module, objective)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before[1], module.parameters(), strict=True))
    assert torch.equal(before[2], objective.parameters)
    assert all(p.grad is None for p in module.parameters())


def test_another_model_is_refused() -> None:
    x = normal(50, 4)
    objective = at_own_outputs(mlp(4, 6, 3, activation=nn.ReLU), x)
    with pytest.raises(ValueError, match="shape"):
        explain_zeros(mlp(4, 5, 3, activation=nn.ReLU), objective)
    with pytest.raises(ValueError, match="expected one of"):
        explain_zeros(mlp(4, 6, 3, activation=nn.ReLU), objective).of_kind("daed")
