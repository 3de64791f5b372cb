//! Writers and readers that keep a pipe busy, and whether all came through.

use std::fs;
use std::path::Path;

use crate::support::{Mount, PYTHON, Running, Store, wait_for};

/// Writes numbered lines, so many a write(2), and notes how many were acknowledged. The last quarter is held back until
/// a file is there.
const NUMBERED: &str = "
import os, sys, time
name, acks, last = sys.argv[1:4]
count, together, longest = map(int, sys.argv[4:])
fd = os.open('topic', os.O_WRONLY)
for first in range(0, count, together):
    while first >= count * 3 // 4 and not os.path.exists(last):
        time.sleep(0.002)
    numbers = range(first, first + together)
    lines = [b'%s %d %s\\n' % (name.encode(), number, b'x' * (number * 37 % longest)) for number in numbers]
    piece = b''.join(lines)
    if os.write(fd, piece) != len(piece):
        sys.exit('a short write')
    with open(acks, 'w') as file:
        print(first + together, file=file)
";

/// The file that lets writers go on with their last quarter.
const LAST: &str = "last";

/// What each writer writes.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    pub(crate) lines: usize,
    /// Lines a write(2).
    together: usize,
    /// No line's rest is so long.
    longest: usize,
}

impl Work {
    /// Lines of up to 3 KB, each for itself.
    pub(crate) const fn single(lines: usize) -> Self {
        Work {
            lines,
            together: 1,
            longest: 3000,
        }
    }

    /// Short lines, 1,400 together: more than a NATS takes as an atomic batch.
    pub(crate) const fn large(writes: usize) -> Self {
        Work {
            lines: 1400 * writes,
            together: 1400,
            longest: 60,
        }
    }
}

fn acknowledged(path: &Path) -> usize {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Writers that number their lines.
pub(crate) struct Writers<'a> {
    store: &'a Store,
    running: Vec<Running>,
}

impl<'a> Writers<'a> {
    pub(crate) fn start(store: &'a Store, mounts: &[&Mount], work: Work) -> Self {
        let acks = |writer: usize| store.folder().join(format!("acks{writer}"));
        let last = store.folder().join(LAST);
        let running = mounts.iter().enumerate().map(|(writer, mount)| {
            let acks = acks(writer);
            let Work {
                lines,
                together,
                longest,
            } = work;
            mount.spawn(&format!(
                "exec {PYTHON} -c \"{NUMBERED}\" w{writer} {} {} {lines} {together} {longest}",
                acks.display(),
                last.display()
            ))
        });
        Writers {
            store,
            running: running.collect(),
        }
    }

    /// Lets them go on with their last quarter: until then none is at its end, whatever the others do.
    pub(crate) fn release(&self) {
        fs::write(self.store.folder().join(LAST), "").expect("written");
    }

    /// Waits until each has `count` lines acknowledged, three quarters of them at most.
    pub(crate) fn await_acknowledged(&self, count: usize) {
        for writer in 0..self.running.len() {
            let acks = self.store.folder().join(format!("acks{writer}"));
            wait_for("acknowledged lines", || {
                (acknowledged(&acks) >= count).then_some(())
            });
        }
    }

    /// Waits for their end; none may have seen an error.
    pub(crate) fn finish(self) {
        self.release();
        for writer in self.running {
            let output = writer.finish();
            assert!(output.status.success(), "{output:?}");
        }
    }
}

/// Each writer's lines are there once and in order, and no others.
pub(crate) fn assert_complete(lines: &[String], writers: usize, work: Work) {
    let mut next = vec![0; writers];
    for line in lines {
        let mut words = line.split(' ');
        let writer: usize = words.next().expect("a name")[1..]
            .parse()
            .expect("a number");
        let number: usize = words.next().expect("a number").parse().expect("a number");
        assert_eq!(number, next[writer], "writer {writer}");
        assert_eq!(
            words.next().expect("a rest").len(),
            number * 37 % work.longest
        );
        next[writer] += 1;
    }
    assert_eq!(next, vec![work.lines; writers]);
}

/// A reader that ends after `lines` lines, and what it has read.
pub(crate) fn follow(mount: &Mount, lines: usize) -> Running {
    mount.spawn(&format!("exec head -n {lines} topic@follow"))
}

pub(crate) fn read_lines(reader: Running) -> Vec<String> {
    let output = reader.finish();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(str::to_owned).collect()
}
