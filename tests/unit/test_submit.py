"""Batch scripts that say what was asked for, and mistakes that are told before anything is submitted."""

import subprocess
from pathlib import Path

import pytest

from swinv2_scale import config, submit

LAUNCH = Path(__file__).parents[2] / "launch"
JOB = ["nodes=2", "cluster.accelerators=4", "cluster.time=0-12:00:00"]
RUN = ["name=x", "epochs=1", "global_batch=64", "micro_batch=8", "data.train=somewhere"]


def scripts(*argv: str) -> list[str]:
    """The batch scripts, which a shell can read."""
    found = [job.script for job in submit.jobs(argv, LAUNCH)]
    for script in found:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return found


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that answer as Slurm does, in a directory of their own; what they are told is in its file `calls`."""
    directory = tmp_path / "slurm"
    directory.mkdir()
    answers = {
        "sinfo": "printf 'batch* 4\\nbatch* 2\\nurgent 1\\n'",
        "sbatch": f"wc -l <{directory}/calls",
        "scancel": "",
    }
    for name, answer in answers.items():
        program = directory / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >>{directory}/calls\n{answer}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return directory


def test_a_script_says_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["partition=gpu", "account=vision", "qos=high", "constraint=a100", "cpus_per_task=12", "python=python"]
    more += ["exclude=[n3]", "options=['--mem=0']", "modules=[cuda/12.4]", "setup=['source .venv/bin/activate']"]
    more += ["environment=['NCCL_DEBUG=a b']", "srun=['--container-image=/x.sqsh']", "prefix='exec --nv'"]
    (script,) = scripts(*JOB, *(f"cluster.{setting}" for setting in more), *RUN, "model.depths=[2,2,2,2]")
    head = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert head == [
        *("job-name=x", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=12", "time=0-12:00:00"),
        *("partition=gpu", "account=vision", "qos=high", "constraint=a100", "exclude=n3", f"chdir={tmp_path}"),
        *(f"output={tmp_path}/runs/x/slurm/%j.log", "open-mode=append", "signal=USR2@300", "requeue", "mem=0"),
    ]
    assert "module load cuda/12.4\nexport NCCL_DEBUG='a b'\nsource .venv/bin/activate\n" in script
    srun = "srun --wait=120 --kill-on-bad-exit=0 --cpus-per-task=12 --container-image=/x.sqsh exec --nv python"
    assert f'{srun} "$@"' in script
    assert f"tasks {LAUNCH}/pretrain.py {' '.join(RUN)} 'model.depths=[2,2,2,2]'\n" in script
    assert '75|140|143) again "exit code $1" && scontrol requeue' in script and "-ge 50 ]" in script
    (bare,) = scripts(*JOB, *RUN, "cluster.gpus_per_node=null", "preflight=false")
    assert "gpus-per-node" not in bare and "doctor" not in bare and "doctor" in script


def test_what_follows_an_exit_code(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script itself, with an srun that ends with each code."""
    run_dir = tmp_path / "runs/x"
    (run_dir / "slurm").mkdir(parents=True)
    (run_dir / "checkpoints/step_00000004").mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (script,) = scripts(*JOB, *RUN, "preflight=false", "kills=2", "restarts=5", "cluster.requeue_codes=[75,143]")

    def started_again(code: int, restarts: int = 0) -> bool:
        (slurm / "calls").write_text("")
        for name, text in {"srun": f"exit {code}", "scontrol": f'echo "$@" >>{slurm}/calls'}.items():
            (slurm / name).write_text(f"#!/bin/sh\n{text}\n")
            (slurm / name).chmod(0o755)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        ended = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=False)
        assert ended.returncode == code, ended.stderr
        return (slurm / "calls").read_text() == "requeue 7\n"

    assert [code for code in (0, 1, 2, 75, 130, 139, 143) if started_again(code)] == [75, 143]
    assert started_again(75, restarts=4) and not started_again(75, restarts=5)
    assert [started_again(137) for _ in range(3)] == [True, False, False]
    (run_dir / "checkpoints/step_00000008").mkdir()
    assert [started_again(137) for _ in range(2)] == [True, False]
    (script,) = scripts(*JOB, *RUN, "preflight=false", "cluster.killed_codes=[]")
    assert not started_again(137)


def test_later_stages_take_over_the_first_ones_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    then = ["--then", "finetune", *RUN, "name=y", "checkpoint=runs/x", "data.validation=v", "nodes=1"]
    first, second = scripts("pretrain", *JOB, "cluster.partition=gpu", *RUN, *then)
    assert "--nodes=2\n" in first and "--nodes=1\n" in second
    assert all("--partition=gpu\n" in script and "--time=0-12:00:00\n" in script for script in (first, second))
    assert "/finetune.py name=x" in second and "name=y checkpoint=runs/x" in second and "/runs/y/slurm/%j" in second


def test_the_jobs_of_an_array_have_their_numbers_in_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (job,) = submit.jobs([*JOB, *RUN, "array='0-4:2,9%2'", "seed=%a", "name=x_%a"], LAUNCH)
    assert [path.name for path in job.run_dirs] == ["x_0", "x_2", "x_4", "x_9"]
    assert "--array=0-4:2,9%2\n" in job.script and f"--output={tmp_path}/runs/x_%a/slurm/%A_%a.log\n" in job.script
    assert 'seed="$SLURM_ARRAY_TASK_ID" name=x_"$SLURM_ARRAY_TASK_ID"\n' in job.script
    assert f'run_dir={tmp_path}/runs/x_"$SLURM_ARRAY_TASK_ID"\n' in job.script


def test_a_site_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "conf"
    conf.symlink_to(config.CONF)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-rL", conf, copy], check=True)
    text = "defaults: [slurm, _self_]\naccelerators: 8\ntime: 1-00:00:00\npartition: gpu\n"
    (copy / "cluster/mine.yaml").write_text(text)
    monkeypatch.setattr(config, "CONF", copy)
    (script,) = scripts("cluster=mine", *RUN)
    assert "--partition=gpu\n" in script and "--gpus-per-node=8\n" in script and "--nodes=1\n" in script


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*JOB, "experiment=demo_simmin"], r"experiment=demo_simmin: no such choice. Did you mean 'demo_simmim'\?"),
        ([*JOB, *RUN, "optim.lrr=1"], r"Did you mean 'optim.lr'\?"),
        ([*JOB, *RUN, "--then", "finetune", "lr=1"], r"'lr' .* Did you mean 'optim.lr'\?"),
        ([*JOB, *RUN, "cluster.partitoin=x"], r"Did you mean 'cluster.partition'\?"),
        ([*JOB, *RUN, "cluster=slrm"], r"cluster=slrm: no such choice. Did you mean 'slurm'\?"),
        (RUN, "needs a value for cluster.accelerators, cluster.time: add cluster.accelerators=…"),
        ([*JOB, *RUN, "cluster.time=60"], "cluster.time=60 is a number: write it as"),
        ([*JOB, *RUN, "nodes=0"], "nodes=0 must be a whole number of at least 1"),
        (["pretain", *JOB, *RUN], "'pretain' is no stage: give one of pretrain, finetune, evaluate"),
        ([*JOB, *RUN, "nodes=3"], "global_batch=64"),
        ([*JOB, *RUN, "array=0-1"], "the jobs would share .*/runs/x: put %a into name=…"),
        ([*JOB, *RUN, "array=few"], "array=few: write it as Slurm does"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        submit.jobs(argv, LAUNCH)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cluster.partition=gpu"], r"cluster.partition=gpu does not exist: choose one of batch \(6 nodes\), urgent"),
        (
            ["nodes=8", "micro_batch=2"],
            r"nodes=8 are more than the 6 of the default partition: batch \(6 nodes\), urgent \(1 nodes\)",
        ),
        (["cluster.partition=urgent"], "nodes=2 are more than the 1 of the partition urgent"),
        (["run_dir=/proc/nowhere"], "run_dir=/proc/nowhere cannot be written"),
    ],
)
def test_what_slurm_does_not_have_is_told(slurm: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        submit.submit(submit.jobs([*JOB, *RUN, *argv], LAUNCH))
    assert "sbatch" not in (slurm / "calls").read_text()


def test_a_machine_without_slurm_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no sbatch on this machine: submit from a login node"):
        submit.submit(submit.jobs([*JOB, *RUN], LAUNCH))


def test_stages_wait_for_each_other_and_named_hosts_are_left_out(slurm: Path, tmp_path: Path) -> None:
    argv = [*JOB, *RUN, "--then", *RUN, "name=y"]
    assert submit.submit(submit.jobs(argv, LAUNCH)) == ["2", "3"]
    calls = (slurm / "calls").read_text().splitlines()
    assert calls[1] == f"sbatch --parsable {tmp_path}/runs/x/slurm/pretrain.sbatch"
    assert "--dependency=afterok:2 --kill-on-invalid-dep=yes" in calls[2] and calls[2].endswith(
        "y/slurm/pretrain.sbatch"
    )
    (tmp_path / "runs/x/slurm/excluded.txt").write_text("n7\nn5\n")
    first, second = submit.jobs([*argv, "cluster.exclude=[n1]"], LAUNCH)
    assert "--exclude=n5,n7\n" in first.script and "--exclude=n1\n" in second.script


def test_a_refused_stage_takes_the_others_back(slurm: Path) -> None:
    refuse = 'case "$*" in *dependency*) echo "Invalid qos" >&2; exit 1;; esac'
    (slurm / "sbatch").write_text(f"#!/bin/sh\n{refuse}\necho 7\n")
    with pytest.raises(ValueError, match="sbatch refuses: Invalid qos"):
        submit.submit(submit.jobs([*JOB, *RUN, "--then", *RUN], LAUNCH))
    assert (slurm / "calls").read_text().splitlines()[-1] == "scancel 7"
