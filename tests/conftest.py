"Settings for every test: one thread a worker, and a last word on the cells that were skipped."
import os

# before anything imports torch: two workers share the cores, so neither may take them all
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'VIPS_CONCURRENCY'): os.environ.setdefault(name, '1')

def pytest_addoption(parser):
    parser.addoption('--flags', default='', help="cells to run that are skipped otherwise, as nbdev_test has it: --flags 'slow cuda'")

def pytest_terminal_summary(terminalreporter):
    "Name the notebooks with skipped cells, and how many of which flag."
    skipped = sorted({value for reports in terminalreporter.stats.values() for report in reports
                      for name, value in getattr(report, 'user_properties', ()) if name == 'skipped_cells'})
    if skipped: terminalreporter.write_line('cells skipped (--flags runs them): ' + '; '.join(skipped))
