"""[[training.blend]]: from file and command line, in which parts; what can't be, in a sentence."""

import pytest

from tests.tiny_run import as_option
from torchtitan.config import ConfigManager, JobConfig, run_schedule, validate
from torchtitan.config.blend import BlendSegment, blend_segments
from torchtitan.tools.errors import UserError

BLEND = [{"name": "web", "weight": 0.7}, {"name": "code", "weight": 0.3}, {"name": "math"}]
REST = {"tokens": 1e6, "blend": {"math": 1}}


def parse(blend, *options, phases=()):
    tables = as_option(blend, "training.blend")
    options = [*options, as_option(phases)] if phases else options
    return ConfigManager().parse_args([tables, "--training.seq_len=1000", *options])


def segments(config: JobConfig) -> list[BlendSegment]:
    return blend_segments(config, run_schedule(config, dp_degree=1))


def test_parts_are_in_lowest_terms_and_change_with_the_phases():
    phases = [
        {"tokens": 10_500},
        {"tokens": 20_000, "blend": {"web": 2, "math": 2}},
        {"tokens": 20_000, "lr": 1e-4},
        REST,
    ]
    config = parse(BLEND, phases=phases)
    validate(config, world_size=1)
    assert segments(config) == [
        BlendSegment(0, (7, 3, 0)),
        BlendSegment(11, (1, 0, 1), 10_500),  # the first sequence with 10,500 tokens behind it
        BlendSegment(51, (0, 0, 1), 50_500),
    ]
    assert segments(ConfigManager().parse_args([])) == []


def test_a_first_phase_may_say_how_the_run_begins():
    phases = [{"tokens": 1e6, "blend": {"web": 1, "code": 1, "math": 1}}]
    assert segments(parse(BLEND, phases=phases)) == [BlendSegment(0, (1, 1, 1))]


def test_weights_may_be_numbers_of_tokens():
    """Then they are rounded, to 0.01 %."""
    blend = [{"name": "web", "weight": 1234567891011}, {"name": "code", "weight": 98765432101}]
    assert segments(parse(blend)) == [BlendSegment(0, (9259, 741))]
    blend[1]["weight"] = 6e7
    with pytest.raises(UserError, match="weight of 'code', 60000000.0, is less than one sequence"):
        segments(parse(blend))


TWO = BLEND[:2]


@pytest.mark.parametrize(
    "blend, options, phases, sentence",
    [
        ([{"name": "web", "weight": 0}], [], [], "training.blend: .*'web', 0.0, must be a finite"),
        ([{"name": "web", "weight": -0.5}], [], [], "'web', -0.5, must be a finite number above 0"),
        ([{"name": "a b", "weight": 1}], [], [], 'blend 1: name = "a b" must be a word'),
        ([*TWO, TWO[0]], [], [], "blend 3: the name 'web' is already taken"),
        (BLEND, [], [], "'math' is never read; give it a weight"),
        (BLEND[2:], [], [{"tokens": 1e6}, REST], "training.blend names no dataset"),
        (TWO, ["--training.dataset=c4"], [], 'dataset = "c4" and .*blend.* both set the data'),
        (TWO, ["--training.dataset_path=x"], [], "dataset_path = .x. and .*leave one out"),
        (TWO, [], [{"tokens": 1e6, "blend": {"wen": 1}}], "phase 1: .*'wen'.*did you mean 'web'"),
        (TWO, [], [{"tokens": 1e6, "blend": {"web": 0}}], "phase 1: blend: .*'web', 0, must be"),
        (TWO, [], [{"tokens": 1e6, "blend": {}}], "phase 1: blend names no dataset"),
        ([], [], [REST], "phase 1: .*which has none; add them there"),
    ],
)
def test_a_blend_that_can_not_be_is_one_sentence(blend, options, phases, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        validate(parse(blend, *options, phases=phases), world_size=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[[training.blend]]\nweight = 1", "blend 1: name is missing"),
        ("[[training.blend]]\nname = 'a'\npath = 'b'", "blend 1: unknown key 'path'"),
        ("[training]\nblend = 'web'", r"a list of tables, for example \[\{ name = \"name\" \}\]"),
        ("[[schedule.phase]]\ntokens = 1\nblend = {web = 'x'}", "blend = .* a table of numbers"),
    ],
)
def test_a_wrong_table_is_one_sentence(toml, text, sentence):
    with pytest.raises(UserError, match=sentence):
        ConfigManager().parse_args([toml(text)])


def test_the_command_line_may_do_without_the_blend_of_the_file(toml):
    file = toml("[[training.blend]]\nname = 'web'\nweight = 1")
    assert file and ConfigManager().parse_args([file]).training.blend[0].name == "web"
    config = ConfigManager().parse_args([file, "--training.blend=[]", "--training.dataset=sample"])
    validate(config, world_size=1)
    assert (config.training.blend, config.training.dataset) == ([], "sample")
