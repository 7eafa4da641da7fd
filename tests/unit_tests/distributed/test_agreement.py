"""How ranks agree over their store: threads take the part of processes here."""

import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from tests.tiny_run import as_option, tiny
from torchtitan.config import ConfigManager
from torchtitan.config.schema import KEYS
from torchtitan.distributed import agreement
from torchtitan.distributed.agreement import Meeting, RefusedElsewhere, explain, ranks_text
from torchtitan.tools.errors import UserError
from torchtitan.trainer import same_run
from torchtitan.trainer.preflight import check_config


def meet(finds: list[Callable], seconds: float = 30, world_size: int | None = None) -> list:
    """Return the error that `agree` raised on each rank, None where it went on."""
    store, results = dist.HashStore(), [None] * len(finds)

    def be(rank: int, find: Callable) -> None:
        meeting = Meeting(store, rank, world_size or len(finds), seconds, rank == 0)
        try:
            meeting.agree(find)
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=be, args=pair) for pair in enumerate(finds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def having(**settings) -> Callable:
    return lambda: settings


def refusing(sentence: str) -> Callable:
    def find():
        raise UserError(sentence)

    return find


def test_equal_settings_go_on():
    assert meet([having(a=1, b=[1.5])] * 3) == [None] * 3


def test_many_ranks_are_told_the_first_difference_in_few_words():
    finds = [having(a=1, b="x", c=rank // 100) for rank in range(100)]
    finds[7] = finds[8] = finds[40] = having(a=1, b="y", c=5)
    told = {str(error) for error in meet(finds)}
    assert told == {
        'the ranks of this run differ in b: "y" on ranks 7-8, 40, "x" on ranks 0-6, 9-39, 41-99 '
        "(1 more settings differ); start all of them with the same command, files and versions."
    }


def test_as_many_kinds_as_ranks_are_told_too(monkeypatch):
    monkeypatch.setattr(agreement, "_MOST_KINDS", 4)
    told = {str(error) for error in meet([having(a=rank) for rank in range(6)])}
    assert len(told) == 1 and "differ in a: 3 on rank 3, 2 on rank 2, 1 on rank 1, 0" in told.pop()


@pytest.mark.parametrize("refuses", [0, 2])
def test_a_refusal_ends_all_ranks_at_once(refuses):
    finds = [having(a=1)] * 4
    finds[refuses] = refusing("file x is not there.")
    began = time.monotonic()
    for rank, error in enumerate(meet(finds)):
        assert isinstance(error, RefusedElsewhere) == (rank != refuses)
        by = "" if rank == refuses else f"rank {refuses}: "
        assert str(error) == f"{by}file x is not there."
    assert time.monotonic() - began < 5


def test_ranks_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(agreement, "LINGER_SECONDS", 0.1)
    told = {str(error) for error in meet([having(a=1)] * 2, seconds=0.3, world_size=5)}
    assert len(told) == 1 and told.pop().startswith("ranks 2-4 of 5 did not join within comm.init_")


def test_a_refusal_is_heard_although_others_never_come(monkeypatch):
    monkeypatch.setattr(agreement, "LINGER_SECONDS", 0.1)
    first, second = meet([having(a=1), refusing("no.")], world_size=8)
    assert (str(first), str(second)) == ("rank 1: no.", "no.")


def test_values_that_are_long_and_begin_alike_are_told_apart():
    sentence = explain([([0], {"a": "x" * 500}), ([1], {"a": "x" * 501})])
    one, two = sentence.partition(": ")[2].split(" on rank ")[:2]
    assert one.strip('1, "') != two and len(sentence) < 400


def test_settings_that_only_one_version_knows():
    assert "differ in b: 2 on rank 1, absent on rank 0" in explain(
        [([0], {"a": 1}), ([1], {"a": 1, "b": 2})]
    )


def test_ranks_text():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text(list(range(0, 40, 2))) == "ranks 0, 2, 4, 6, 8, 10, 12, 14, ..."


# ---------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------


def settings(tmp_path, *options: str) -> dict:
    config = ConfigManager().parse_args([*tiny(tmp_path), *options])
    return dict(same_run.settings_of_run(config, check_config(config)))


def test_every_key_of_the_config_is_compared_or_listed(tmp_path):
    found = settings(tmp_path, "--checkpoint.enable")
    compared = {key for key in KEYS if key in found}
    # Free tables: their entries are compared, and these have none.
    left_out = set(KEYS) - compared - {"model.args", "chat.template_kwargs"}

    def outside_lists(keys):
        return {key for key in keys if ".blend." not in key and ".sets." not in key}

    assert outside_lists(left_out) == outside_lists(same_run.MAY_DIFFER)


def test_saving_on_some_ranks_is_named_before_the_folder_that_only_they_compare(tmp_path):
    compared = list(settings(tmp_path, "--checkpoint.enable"))
    assert compared.index("checkpoint.enable") < compared.index("job.dump_folder")


def test_kernels_in_cuda_are_compared_as_the_code_is():
    assert "torchtitan/ops/grouped_mm.cu" in same_run.source_digests()


def test_tables_in_lists_are_compared_by_key_without_their_paths(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a"}\n')
    row = {"name": "a", "weight": 1.0, "dataset": "text", "dataset_path": str(data)}
    blend = as_option([row], "training.blend")
    found = settings(tmp_path, blend, "--training.dataset=c4_test")
    assert found["training.blend.1.name"] == "a"
    assert "training.blend.1.dataset_path" not in found


@pytest.mark.parametrize(
    "option, key",
    [
        ("--training.seq_len=64", "training.seq_len"),
        ("--training.steps=5", "training.steps"),
        ("--model.args.moe_args.top_k=2", "model.args.moe_args.top_k"),
        ("--metrics.alarm=[]", None),
        ("--job.description=x", None),
        ("--job.dump_folder=elsewhere", None),
    ],
)
def test_one_option_of_one_rank(tmp_path, option, key):
    one, other = settings(tmp_path), settings(tmp_path, option)
    if key is None:
        assert one == other
    else:
        assert f"differ in {key}: " in explain([([0], one), ([1], other)])


def test_folders_of_ranks_that_save_together_are_compared(tmp_path):
    one = settings(tmp_path / "a", "--checkpoint.enable")
    other = settings(tmp_path / "b", "--checkpoint.enable")
    assert "differ in job.dump_folder: " in explain([([0], one), ([1], other)])
