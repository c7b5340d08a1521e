import logging

from knet_jax.quiet import silenced


def test_one_package_is_silenced_and_only_inside(caplog):
    logger = logging.getLogger("absl")
    logger.addHandler(caplog.handler)

    def say(text, pathname):
        logger.handle(logging.LogRecord("absl", logging.ERROR, pathname, 1, text, None, None))

    try:
        with silenced("noisy"):
            say("hidden", "/site-packages/noisy/io/file.py")
            say("of another", "/site-packages/noisy_not/file.py")
        say("after", "/site-packages/noisy/io/file.py")
    finally:
        logger.removeHandler(caplog.handler)
    said = {record.getMessage() for record in caplog.records}
    assert said == {"of another", "after"}
