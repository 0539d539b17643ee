"""How poems.py, poems_page.py and reason.py write their files, and how they end: without a traceback."""
import errno
import io
import os
import sys
from contextlib import contextmanager, suppress

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fail(message, code=2):
    """End with one line on stderr. Exit code 2 is a mistake of the user or something missing, 1 a run that
    went wrong."""
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).splitlines())}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def writing(path):
    """Open a file to write it, all of it or nothing."""
    part = f'{path}.{os.getpid()}.part'             # two runs at once do not disturb each other
    try:
        with open(part, 'w', encoding='utf-8', newline='') as f:
            yield f
        os.replace(part, path)
    except OSError as e:                            # of a full disk Python does not say which file it was
        e.filename = e.filename or path
        raise
    finally:
        with suppress(FileNotFoundError):
            os.remove(part)
    print(f"wrote {path}", flush=True)


@contextmanager
def running():
    """What a script does: whatever ends it is one line, Ctrl-C and a full disk, too."""
    if isinstance(sys.stdout, io.TextIOWrapper):            # it may be closed
        sys.stdout.reconfigure(errors='backslashreplace')   # a path may have letters that a log lacks
    try:
        yield
        print(end='', flush=True)                   # while a full disk can still be told
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os._exit(141)
    except OSError as e:
        if e.errno not in FULL:
            fail(f"{e.filename}: {e.strerror}" if e.filename else e)
        with suppress(SystemExit):
            fail(f"{e.filename or 'stdout'}: {e.strerror}", code=1)
        os._exit(1)                                 # else Python writes out stdout once more, and fails aloud
    except ValueError as e:
        fail(e)
