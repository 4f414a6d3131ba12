"""The real server process, with workers that need no JAX and with fail points."""

import functools
import sys

import tx_async.app
from tx_async import cli
from tx_async.testing import fail_points

tx_async.app.create_app = functools.partial(tx_async.app.create_app, engine="tx_async.testing.fake_worker:create")
fail_points.install()
sys.exit(cli.main(sys.argv[1:]))
