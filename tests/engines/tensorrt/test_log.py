"""The log outlives nothing that TensorRT still writes to."""

import gc
import subprocess
import sys

from gate.engines.tensorrt.log import Log


class ILogger:
    """What a module's ILogger is to its subclass."""


class Module:
    ILogger = ILogger


class Severity:
    def __init__(self, name):
        self.name = name


def test_messages_after_a_log_is_gone_go_to_whoever_works_now():
    first = Log()
    logger = first.logger(Module)
    del first
    gc.collect()
    second = Log()
    second.logger(Module)
    logger.log(Severity("ERROR"), "the registry refuses a library")
    assert second.complaints() == ("ERROR: the registry refuses a library",)


def test_a_log_hears_its_own_logger_alone():
    first, second = Log(), Log()
    logger = first.logger(Module)
    second.logger(Module)
    logger.log(Severity("WARNING"), "mine")
    assert (first.complaints(), second.complaints()) == (("WARNING: mine",), ())


def test_a_message_that_nobody_waits_for_is_dropped():
    code = (
        "import gc\n"
        "from gate.engines.tensorrt.log import Log\n"
        "class M:\n"
        "    class ILogger: pass\n"
        "logger = Log().logger(M)\n"
        "gc.collect()\n"
        "logger.log('ERROR', 'late')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_first_logger_of_the_process_is_kept_for_the_plugin_registry(tmp_path):
    (tmp_path / "bad.so").write_bytes(b"no library")
    code = (
        "import gc, sys, tensorrt_rtx as trt\n"
        "from gate.engines.tensorrt.log import Log\n"
        "log = Log()\n"
        "trt.Builder(log.logger(trt))\n"
        "del log\n"
        "gc.collect()\n"
        "junk = [bytes(200) for _ in range(100000)]\n"
        "assert trt.get_plugin_registry().load_library(sys.argv[1]) is None\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "bad.so")], check=True, timeout=60)
