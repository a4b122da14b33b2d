import numpy as np
import pytest

from deeprec.graph.transcript import Transcript, segment, segment_ids


def test_reads_off_what_was_appended() -> None:
    transcript = Transcript(
        [
            segment("prompt", [1, 2, 3]),
            segment("policy", [4, 5], [-0.5, -0.25]),
            segment("environment", [6]),
            segment("guided", [7], [-1.0]),
            segment("forced", [8]),
            segment("policy", [9], [-2.0]),
        ]
    )
    assert transcript.ids == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert transcript.prompt_ids == [1, 2, 3]
    assert transcript.completion_ids == [4, 5, 6, 7, 8, 9]
    assert transcript.logprobs == [-0.5, -0.25, 0.0, -1.0, 0.0, -2.0]
    assert transcript.env_mask == [1, 1, 0, 0, 0, 1]
    assert transcript.authors == ["policy", "policy", "environment", "guided", "forced", "policy"]
    assert transcript.count("policy") == 3
    assert transcript.count("prompt", "environment") == 4
    assert len(transcript) == 9


def test_empty_transcript_and_segment() -> None:
    assert Transcript([]).ids == []
    assert Transcript([segment("prompt", [])]).completion_ids == []


def test_ids_survive_the_packing() -> None:
    ids = [0, 1, 65_535, 65_536, 2**31 - 1]
    assert segment_ids(segment("prompt", ids)).tolist() == ids
    assert segment_ids(segment("prompt", ids)).dtype == np.int32


@pytest.mark.parametrize("author", ["policy", "guided"])
def test_sampled_tokens_need_logprobs(author: str) -> None:
    with pytest.raises(ValueError, match="needs logprobs"):
        segment(author, [1])


@pytest.mark.parametrize("author", ["prompt", "forced", "environment"])
def test_unsampled_tokens_have_none(author: str) -> None:
    with pytest.raises(ValueError, match="has no logprobs"):
        segment(author, [1], [-0.1])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 token ids came with 1 logprobs"):
        segment("policy", [1, 2], [-0.1])


def test_only_the_first_segment_is_the_prompt() -> None:
    with pytest.raises(ValueError, match="first segment"):
        Transcript([segment("prompt", [1]), segment("prompt", [2])])
