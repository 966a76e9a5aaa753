"""The processes of one run: what each is told, who has ended, and their end."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Final

from gwp_edge.child_process import start_shielded
from gwp_edge.guardian import guardian_main
from gwp_edge.mailbox import Board
from gwp_edge.motor_process import ArmSetup, motor_main
from gwp_edge.policy_options import PolicySetup
from gwp_edge.policy_process import policy_main
from gwp_edge.run_options import OPERATOR_RESUME_S, RunOptions
from gwp_edge.status import Word

logger = logging.getLogger(__name__)

_END_TIMEOUT_S: Final = 2.0


class RunProcesses:
    """Guardian, motor and policy process. Threads: one owner, who supervises them.

    Attributes:
        guardian: None where the arm allows no second connection, or nothing is sent.
        motor: None before the start.
    """

    def __init__(self, options: RunOptions, board: Board) -> None:
        self._options = options
        self._board = board
        self._all: dict[str, BaseProcess] = {}
        self.guardian: BaseProcess | None = None
        self.motor: BaseProcess | None = None

    def start(self, extra: Mapping[str, object]) -> bool:
        """Start all of them; return whether a guardian is among them.

        Args:
            extra: options that the world adds to those of the robot file.
        """
        options, words = self._options, self._board.words
        setup = ArmSetup(
            board=self._board.name,
            spec=options.spec,
            robot=options.robot,
            supervisor_pid=os.getpid(),
            extra=dict(extra),
        )
        words[Word.SUPERVISOR_PID] = os.getpid()
        if options.is_guarded:
            self.guardian = self._spawn(
                "guardian",
                guardian_main,
                setup,
                timeout_ns=round(options.guardian_timeout_s * 1e9),
                realtime=options.motor.realtime,
                priority=max(1, options.motor.priority - 10),
            )
        resume_ns = round(OPERATOR_RESUME_S * 1e9) if options.interactive else None
        motor = dataclasses.replace(options.motor, resume_ns=resume_ns)
        self.motor = self._spawn("motor", motor_main, setup, motor)
        words[Word.MOTOR_PID] = self.motor.pid or 0
        policy_setup = PolicySetup(
            board=setup.board,
            spec=setup.spec,
            robot=setup.robot,
            supervisor_pid=setup.supervisor_pid,
            extra=setup.extra,
        )
        self._spawn("policy", policy_main, policy_setup, options.policy)
        return self.guardian is not None

    def _spawn(
        self, name: str, target: Callable[..., None], *args: object, **kwargs: object
    ) -> BaseProcess:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=target, args=args, kwargs=kwargs, name=f"gwp-{name}")
        start_shielded(process)
        self._all[name] = process
        return process

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {name: process.pid or 0 for name, process in self._all.items()}

    def ended(self) -> tuple[str, int] | None:
        """Return name and exit code of one that has ended, or None while all live."""
        for name, process in self._all.items():
            if process.exitcode is not None:
                return name, process.exitcode
        return None

    def end(self) -> None:
        """End all of them; the arm stands by now, or the guardian has it."""
        words = self._board.words
        words[Word.POLICY_STOP] = words[Word.GUARDIAN_STOP] = 1
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        for process in self._all.values():
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.is_alive():
                # Only a policy inside a long inference, or a guardian that hangs, is left here.
                logger.info("%s did not end in time and was killed", process.name)
                process.kill()
                process.join()
            process.close()
        self._all.clear()
