"""The processes of compare_peers.py: none of them outlives it."""
import os
import signal
import subprocess
import sys
import tempfile

CHILDREN = []


class Failure(Exception):
    """What ends the comparison, in words for its user."""


class NotMeasured(Failure):
    """What a worker cannot do, in its words; the others go on."""


def environment(threads, kept=False):
    """`kept`: glibc's allocator never gives memory back, so that PyTorch's tensors are not paged in anew."""
    names = ("RAYON_NUM_THREADS", "CANDLE_NUM_THREADS", "OMP_NUM_THREADS")
    # A backtrace would make candle's errors more than the one line that an answer is.
    env = dict(os.environ, RUST_BACKTRACE="0", **{name: str(threads) for name in names})
    # As in .cargo/config.toml: this crate and candle-nn allocate with mimalloc, which then keeps its memory.
    env.update(MIMALLOC_PURGE_DELAY="-1")
    if kept:
        # The top pad is the step by which the heap grows; the others are above any tensor's size.
        env.update(MALLOC_TRIM_THRESHOLD_=str(1 << 40), MALLOC_MMAP_THRESHOLD_=str(1 << 40))
        env.update(MALLOC_MMAP_MAX_="0", MALLOC_TOP_PAD_=str(1 << 28))
    return env


def start(command, **options):
    child = subprocess.Popen([str(word) for word in command], text=True, **options)
    CHILDREN.append(child)
    return child


def kill_all():
    for child in CHILDREN:
        # Stopped ones as well: this signal does not wait for them.
        if child.poll() is None:
            child.kill()
            child.wait()


def run(command, otherwise, **options):
    """What the command prints; its stderr is the user's to read as it comes."""
    child = start(command, stdout=subprocess.PIPE, **options)
    output, _ = child.communicate()
    if child.returncode:
        raise Failure(otherwise)
    return output


def run_measured(command, env):
    """What the command prints, and its peak memory in MiB."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = start(command, stdout=stdout, stderr=stderr, env=env)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise Failure(f"{command[0]} ended with {child.returncode}:\n{tail(stderr)}")
        stdout.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return stdout.read(), usage.ru_maxrss * unit / (1 << 20)


def tail(file, length=2000):
    file.seek(0)
    return file.read()[-length:]


class Worker:
    """A process that answers lines. While it is not asked it is stopped: both libraries' idle threads
    spin for a while, which would cost the others time."""

    def __init__(self, command, env, says_ready=False):
        self.stderr = tempfile.TemporaryFile("w+")
        self.child = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, env=env)
        if says_ready:
            self.answer()
        self.child.send_signal(signal.SIGSTOP)

    def ask(self, line):
        """The median in µs."""
        self.child.send_signal(signal.SIGCONT)
        try:
            self.child.stdin.write(f"{line}\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # Then there is no answer either.
        answer = self.answer(line)
        self.child.send_signal(signal.SIGSTOP)
        if answer.startswith("error"):
            raise NotMeasured(answer.removeprefix("error:").strip())
        try:
            median, _fastest = map(float, answer.split())
        except ValueError:
            raise Failure(f"{self.name()}\nanswered {answer!r} to {line!r}") from None
        return median

    def name(self):
        return " ".join(map(str, self.child.args))

    def answer(self, line="start"):
        answer = self.child.stdout.readline()
        if not answer:
            code = self.child.wait()
            raise Failure(f"{self.name()}\ndied with {code} at {line!r}; its stderr:\n{tail(self.stderr)}")
        return answer.strip()

    def kill(self):
        self.child.kill()
        self.child.wait()
