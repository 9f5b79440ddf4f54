"""What TensorRT tells while it builds: progress on stderr, errors kept for one clear message."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from chai_export.progress import ProgressLines


class BuildProgress:
    """Bars for the builder's phases, nested as TensorRT reports them; a context manager.

    :attr:`monitor` is the ``IProgressMonitor`` to give to the builder. When stderr is not a terminal the
    outermost phases are told as lines. Ctrl-C ends the build at the next step.
    """

    def __init__(self, tensorrt: Any) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._progress = Progress(console=console, disable=not console.is_terminal, transient=True)
        self._tasks: dict[str, Any] = {}
        self._lines: dict[str, ProgressLines] | None = None if console.is_terminal else {}
        self.monitor = self._make_monitor(tensorrt)

    def __enter__(self) -> BuildProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _make_monitor(self, tensorrt: Any) -> Any:
        owner = self

        class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
            """Forwards TensorRT's calls, which come from its builder threads."""

            def __init__(self) -> None:
                tensorrt.IProgressMonitor.__init__(self)

            def phase_start(self, name: str, parent: str | None, steps: int) -> None:
                if owner._lines is not None and not parent:
                    owner._lines[name] = ProgressLines(name, steps)
                owner._tasks[name] = owner._progress.add_task(name, total=steps)

            def step_complete(self, name: str, step: int) -> bool:
                try:
                    if name in owner._tasks:
                        owner._progress.update(owner._tasks[name], completed=step + 1)
                    if owner._lines is not None and name in owner._lines:
                        owner._lines[name].after(step + 1)
                except KeyboardInterrupt:
                    return False
                return True

            def phase_finish(self, name: str) -> None:
                if name in owner._tasks:
                    owner._progress.remove_task(owner._tasks.pop(name))
                if owner._lines is not None and name in owner._lines:
                    owner._lines.pop(name).finish()

        return Monitor()


def error_recorder(tensorrt: Any) -> Any:
    """An ``IErrorRecorder`` whose ``messages`` lists what TensorRT reported, first to last."""

    class Recorder(tensorrt.IErrorRecorder):  # type: ignore[misc]
        """Keeps every report."""

        def __init__(self) -> None:
            tensorrt.IErrorRecorder.__init__(self)
            self.messages: list[str] = []
            self._codes: list[Any] = []

        def get_num_errors(self) -> int:
            return len(self.messages)

        def get_error_code(self, index: int) -> Any:
            return self._codes[index]

        def get_error_desc(self, index: int) -> str:
            return self.messages[index]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.messages.clear()
            self._codes.clear()

        def report_error(self, code: Any, message: str) -> bool:
            self.messages.append(" ".join(message.split()))
            self._codes.append(code)
            return False

    return Recorder()
