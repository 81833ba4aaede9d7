"""Which of a peer's requirements are installed."""

from fusionserve.loadtest.bench.peers import needed_for_text


def test_sound_pictures_extras_and_other_machines_are_left_out() -> None:
    listed = [
        "regex",
        "torch==2.13.0+cpu; platform_machine == 'x86_64'",
        "torchvision",
        "torchaudio; platform_machine != 's390x'",
        "opencv-python-headless>=4.13.0",
        "mistral_common[image]>=1.11.6",
        "fastapi[standard]<0.137.0,>=0.133.0",
        "pandas; extra == 'bench'",
        "winloop; sys_platform == 'no_such_platform'",
    ]
    assert needed_for_text(listed) == [
        *("regex", "mistral_common>=1.11.6", "fastapi[standard]<0.137.0,>=0.133.0")
    ]
