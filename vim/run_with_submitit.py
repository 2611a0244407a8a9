#!/usr/bin/env python3
"""Train on a SLURM cluster, through submitit: as many machines as --nodes, one process for each of their GPUs.

python vim/run_with_submitit.py --job_dir /shared/folder/%j --model NAME --data-path DIR [further flags of main.py]
"""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from command_line import pip_install, positive
    from flags import UsageError, get_args_parser
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}; run `python3 setup_cpu_env.py` once, then this with its Python.", file=sys.stderr)
    sys.exit(2)

__all__ = ["Trainer", "parse_args", "run", "submit"]

CHECKPOINTS = Path("/checkpoint")  # where upstream's cluster keeps the folder of each person
GIGABYTES_PER_GPU = 40
CPUS_PER_GPU = 10
WARNING_SECONDS = 120  # between the cluster's word that it wants the machine back and its taking it


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: all flags of `main.py`, and those of the cluster."""
    summary = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=summary, parents=[get_args_parser()])
    group = parser.add_argument_group("the job on the cluster")
    add = group.add_argument
    add("--ngpus", type=positive, default=8, help="GPUs of each machine, with a process each (default: %(default)s)")
    add("--nodes", type=positive, default=2, help="machines (default: %(default)s)")
    add("--timeout", type=positive, default=2800, help="longest time of the job, minutes (default: %(default)s)")
    add("--job_dir", default="", help="folder for logs and checkpoints, which all machines share, instead of "
        "--output_dir; %%j stands for the number of the job (default: /checkpoint/USER/experiments/%%j)")  # fmt: skip
    add("--partition", default="learnfair", help="the cluster's partition (default: %(default)s)")
    add("--use_volta32", action="store_true", help="take only machines whose GPUs are V100 with 32 GB")
    add("--comment", default="", help="text for the cluster's scheduler")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (that of the process by default)."""
    return build_parser().parse_args(arguments)


class Trainer:
    """What each process of the job does; submitit pickles it, and calls it on the machines.

    A pickle of it names no module of this folder: the job may start with another sys.path.

    Args:
        args: the command line; args.output_dir may hold %j, which becomes the number of the job.
        shared: folder that all machines see, for the file through which they meet.
    """

    def __init__(self, args: argparse.Namespace, shared: Path) -> None:
        self.args, self.shared = args, str(shared)
        self.code = str(Path(__file__).resolve().parent)
        self.attempt = uuid.uuid4().hex

    def __call__(self) -> None:
        """Join the other processes and train, from the last checkpoint of this job if there is one."""
        import submitit

        place = submitit.JobEnvironment()
        args = argparse.Namespace(**vars(self.args))  # self stays as it was handed in, for a second time
        args.output_dir = str(args.output_dir).replace("%j", str(place.job_id))
        args.auto_resume = not args.eval
        os.environ["RANK"] = str(place.global_rank)
        os.environ["LOCAL_RANK"] = str(place.local_rank)
        os.environ["WORLD_SIZE"] = str(place.num_tasks)
        args.rank, args.gpu, args.world_size = place.global_rank, place.local_rank, place.num_tasks
        args.dist_url = self.meeting_place(place.job_id)
        sys.path.insert(0, self.code)
        import main

        main.main(args)

    def meeting_place(self, job_id: str) -> str:
        """Return the address at which the processes meet: a file of its own for each start of the job.

        What an earlier start left in its file would mislead a later one. Not `Path.as_uri`: torch takes the
        path as it stands, so a space must stay a space.
        """
        start = os.environ.get("SLURM_RESTART_COUNT", "0")
        return f"file://{self.shared}/.meeting-{self.attempt}-{job_id}-{start}"

    def checkpoint(self) -> Any:
        """Return what submitit queues again when the cluster takes the machines back: the same, with a new file."""
        import submitit

        self.attempt = uuid.uuid4().hex
        return submitit.helpers.DelayedSubmission(self)


def submit(args: argparse.Namespace) -> tuple[str, Path]:
    """Hand the training in to the cluster; return the number of the job and its folder.

    Raises:
        UsageError: submitit is not installed, there is no folder for the job, or the cluster refuses it.
    """
    try:
        import submitit
    except ImportError as error:
        raise UsageError(
            f"Handing in a job needs the package submitit ({error}); {pip_install('submitit')} installs it."
        ) from error
    job_dir, shared = find_folders(args.job_dir)
    args.job_dir = args.output_dir = str(job_dir)
    try:
        executor = submitit.AutoExecutor(folder=args.job_dir, slurm_max_num_timeout=30)
        executor.update_parameters(**describe_job(args))
        job_id = str(executor.submit(Trainer(args, shared)).job_id)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"submitit could not hand in the job: {error}") from error
    return job_id, Path(str(job_dir).replace("%j", job_id))


def find_folders(job_dir: str) -> tuple[Path, Path]:
    """Return the job's folder, with %j if it has that, and the one above it that is there before the job is.

    Args:
        job_dir: as on the command line; empty: in the person's folder of upstream's cluster.
    Raises:
        UsageError: that folder does not exist, or the one above the job's cannot be made.
    """
    if not job_dir:
        shared = CHECKPOINTS / os.environ.get("USER", "") / "experiments"
        if not shared.is_dir():
            raise UsageError(
                f"There is no folder {shared}: name one that all machines share, as in --job_dir /shared/folder/%j."
            )
        return shared / "%j", shared
    path = Path(job_dir).expanduser().absolute()
    shared = next(folder for folder in path.parents if "%" not in str(folder))
    try:
        shared.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--job_dir: the folder {shared} cannot be made: {error.strerror}.") from error
    return path, shared


def describe_job(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the job needs of the cluster, as submitit names it: memory in GB, times in minutes and seconds."""
    needs: dict[str, Any] = {
        "name": "deit",  # upstream's name for it
        "mem_gb": GIGABYTES_PER_GPU * args.ngpus,
        "gpus_per_node": args.ngpus,
        "tasks_per_node": args.ngpus,
        "cpus_per_task": CPUS_PER_GPU,
        "nodes": args.nodes,
        "timeout_min": args.timeout,
        "slurm_partition": args.partition,
        "slurm_signal_delay_s": WARNING_SECONDS,
    }
    if args.use_volta32:
        needs["slurm_constraint"] = "volta32gb"
    if args.comment:
        needs["slurm_comment"] = args.comment
    return needs


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code: 2, after one sentence, if it cannot be done."""
    args = parse_args(arguments)
    try:
        job_id, folder = submit(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Submitted job {job_id}; its logs and checkpoints go to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run())
