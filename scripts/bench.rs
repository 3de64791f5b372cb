//! Measures dnpipes against floors taken in the same run: an empty FUSE write, one `fdatasync`, a plain file.
//!
//! Short rounds of floor and subject alternate and each gives one ratio, so that a machine whose speed
//! drifts moves both sides alike. A missed bar is a result, not a failure: the exit code says only whether
//! everything could be measured.

use std::error::Error;
use std::ffi::{CString, OsStr};
use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "bench_bare.rs"]
mod bare;
#[path = "bench_brokers.rs"]
mod brokers;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const LINE: [u8; 100] = {
    let mut line = [b'x'; 100];
    line[99] = b'\n';
    line
};
const MIB: usize = 1 << 20;
/// A little over 64 MiB.
const BIG_LINES: usize = 64 * MIB / LINE.len() + 1;
/// What GNU cat reads and writes at a time.
const CAT_BUFFER: usize = 128 << 10;
const DEADLINE: Duration = Duration::from_secs(10);

/// Measures dnpipes against what the kernel and the disk allow.
#[derive(Parser)]
struct Args {
    /// The dnpipes binary [default: the one built beside this program]
    #[arg(long, value_name = "FILE", overrides_with = "dnpipes")]
    dnpipes: Option<PathBuf>,
    /// A tenth of the operations, and a pipe of 64 MiB for the memory rows
    #[arg(long)]
    quick: bool,
    /// Only the rows whose id contains this
    #[arg(long, value_name = "SUBSTRING", default_value = "")]
    only: String,
    /// Write the results as JSON here, not as a last line on standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the databases live [default: the build directory]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Serve the empty file system there, until SIGTERM
    #[arg(long, value_name = "MOUNTPOINT", hide = true)]
    noop_fuse: Option<PathBuf>,
    /// What is written there goes to FILE, and to who reads in the other directory
    #[arg(long, num_args = 2, value_names = ["FAR", "FILE"], requires = "noop_fuse", hide = true)]
    wakes: Option<Vec<PathBuf>>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match (&args.noop_fuse, args.wakes.as_deref()) {
        (Some(near), Some([far, file])) => bare::serve_two(near, far, file),
        (Some(mountpoint), _) => bare::serve(mountpoint),
        (None, _) => run(&args),
    };
    if let Err(error) = outcome {
        eprintln!("bench: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn run(args: &Args) -> Result<()> {
    stop_on_signal();
    let bench = Bench::new(args)?;
    let [filesystem, kernel, cpus] = bench.machine();
    println!(
        "databases on {filesystem}, Linux {kernel}, {cpus} CPUs; M/s: million messages a second\n{HEADER}"
    );
    let (mut rows, mut failed) = (Vec::new(), 0);
    let all = || ROWS.iter().chain(brokers::rows());
    for (id, measure) in all().filter(|row| row.0.contains(&args.only)) {
        let row = measure(&bench);
        refuse_if_stopped()?;
        match row {
            Ok(row) => {
                println!("{}", row.line(id));
                rows.push(row.json(id));
            }
            Err(error) => {
                println!("{id:<26} FAILED: {error}");
                rows.push(json!({ "id": id, "error": error.to_string() }));
                failed += 1;
            }
        }
    }
    let results = json!({
        "quick": args.quick, "filesystem": filesystem, "kernel": kernel, "cpus": cpus, "rows": rows,
    });
    match &args.json {
        Some(path) => at(path, fs::write(path, format!("{results:#}\n")))?,
        None => println!("{results}"),
    }
    match (rows.len(), failed) {
        (0, _) => {
            let ids: Vec<&str> = all().map(|row| row.0).collect();
            Err(format!("the ids are: {}", ids.join(" ")).into())
        }
        (_, 0) => Ok(()),
        (all, failed) => Err(format!("{failed} of {all} rows could not be measured").into()),
    }
}

// ---- The rows ----

type Measure = fn(&Bench) -> Result<Row>;

const ROWS: [(&str, Measure); 16] = [
    ("memory-write", memory_write),
    ("memory-write-1-cpu", |b| on_one_cpu(b, memory_write)),
    ("sqlite-process-write", sqlite_process_write),
    ("sqlite-process-write-1-cpu", |b| {
        on_one_cpu(b, sqlite_process_write)
    }),
    ("sqlite-write", sqlite_write),
    ("cat-in", cat_in),
    ("cat-out", cat_out),
    ("wake", |b| wake(b, "wake", |floor| floor)),
    ("wake-rested", |b| wake(b, "wake-rested", rested)),
    ("wake-bare", wake_bare),
    ("memory-100-readers", memory_100_readers),
    ("memory-1-reader", memory_1_reader),
    ("http-write", http_write),
    ("http-cat-in", http_cat_in),
    ("http-follow-out", http_follow_out),
    ("http-wake", http_wake),
];

fn memory_write(bench: &Bench) -> Result<Row> {
    write_without_sync(bench, "memory:", 1.3)
}

fn sqlite_process_write(bench: &Bench) -> Result<Row> {
    let source = format!("{}?durability=process", bench.sqlite("process"));
    write_without_sync(bench, &source, 2.0)
}

/// On several CPUs the scheduler's choice of one for the server decides much of a short request's time,
/// and it can choose otherwise for the floor. Here it has no choice, and what is left is the work.
fn on_one_cpu(bench: &Bench, measure: Measure) -> Result<Row> {
    const SIZE: usize = size_of::<libc::cpu_set_t>();
    // The processes that are started meanwhile inherit the choice.
    // SAFETY: an all-zero cpu_set_t is valid, and every pointer is to a live one of that size.
    unsafe {
        let (mut all, mut one) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sched_getaffinity(0, SIZE, &mut all);
        libc::CPU_SET(libc::sched_getcpu().try_into()?, &mut one);
        libc::sched_setaffinity(0, SIZE, &one);
        let row = measure(bench);
        libc::sched_setaffinity(0, SIZE, &all);
        row
    }
}

fn write_without_sync(bench: &Bench, source: &str, bar: f64) -> Result<Row> {
    let (mount, noop) = (bench.mount(source)?, bench.noop()?);
    let floors = vec![(1.0, write_op(&noop.path("floor"))?)];
    let rounds = bench.alternate(91, 200, floors, write_op(&mount.path("pipe"))?)?;
    Ok(Row::of_rounds(Kind::Latency, bar, "1 no-op write", &rounds))
}

fn sqlite_write(bench: &Bench) -> Result<Row> {
    let (mount, noop) = (bench.mount(&bench.sqlite("default"))?, bench.noop()?);
    let floors = vec![
        (1.0, write_op(&noop.path("floor"))?),
        (1.0, append_op(&bench.path("append"))?),
    ];
    let rounds = bench.alternate(45, 100, floors, write_op(&mount.path("pipe"))?)?;
    let floor = "1 no-op write + 1 append and fdatasync";
    Ok(Row::of_rounds(Kind::Latency, 1.5, floor, &rounds))
}

fn cat_in(bench: &Bench) -> Result<Row> {
    let lines = bench.scaled(1_000_000);
    let file = bench.lines_file(lines)?;
    let data = fs::read(&file)?;
    let mount = bench.mount(&bench.sqlite("cat-in"))?;
    let mut rounds = Vec::new();
    for round in 0..5 {
        let floor = append_in_pieces(&bench.path(&format!("pieces{round}")), &data)?;
        let measured = cat(&[&file], &mount.path(&format!("pipe{round}")))?;
        same_bytes(&mount.path(&format!("pipe{round}@snapshot")), &data)?;
        rounds.push((rate(lines, floor), rate(lines, measured)));
    }
    let floor = "append and fdatasync every 128 KiB";
    Ok(Row::of_rounds(Kind::Rate, 1e6, floor, &rounds))
}

fn cat_out(bench: &Bench) -> Result<Row> {
    let lines = bench.scaled(1_000_000);
    let file = bench.lines_file(lines)?;
    let mount = bench.mount(&bench.sqlite("cat-out"))?;
    let (pipe, null) = (mount.path("pipe@snapshot"), Path::new("/dev/null"));
    cat(&[&file], &mount.path("pipe"))?;
    same_bytes(&pipe, &fs::read(&file)?)?;
    let mut rounds = Vec::new();
    for _ in 0..9 {
        let floor = cat(&[&file], null)?;
        let measured = cat(&[&pipe], null)?;
        rounds.push((rate(lines, floor), rate(lines, measured)));
    }
    let floor = "cat of the plain file";
    Ok(Row::of_rounds(Kind::Rate, 3e6, floor, &rounds))
}

/// The reader is blocked before each push, so that the machine rests in between. The plain row's floors
/// follow one another without a rest; the other row's floors rest as long as the subject does.
fn wake(bench: &Bench, name: &str, floor: fn(Op) -> Op) -> Result<Row> {
    let source = bench.sqlite(name);
    let (near, far) = (bench.mount(&source)?, bench.mount(&source)?);
    let noop = bench.noop()?;
    let subject = wake_op(&near.path("pipe"), &far.path("pipe@follow"))?;
    let floors = vec![
        (3.0, floor(write_op(&noop.path("floor"))?)),
        (1.0, floor(append_op(&bench.path("append"))?)),
    ];
    let rounds = bench.alternate(45, 30, floors, subject)?;
    let floor = "3 no-op writes + 1 append and fdatasync";
    Ok(Row::of_rounds(Kind::Latency, 1.0, floor, &rounds))
}

/// The same against file systems that do no more than it takes: what is left is what dnpipes adds.
fn wake_bare(bench: &Bench) -> Result<Row> {
    let source = bench.sqlite("wake-bare");
    let (near, far) = (bench.mount(&source)?, bench.mount(&source)?);
    let other = at(&bench.path(""), tempfile::tempdir_in(bench.path("")))?;
    let (other_far, file) = (other.path().join("far"), other.path().join("append"));
    at(&other_far, fs::create_dir(&other_far))?;
    let args = ["--wakes".as_ref(), other_far.as_os_str(), file.as_os_str()];
    let other_near = Mount::start(
        &bench.exe,
        &[&args[..], &["--noop-fuse".as_ref()]].concat(),
        bench.dir.path(),
    )?;
    let floor = wake_op(&other_near.path("pipe"), &other_far.join("pipe"))?;
    let subject = wake_op(&near.path("pipe"), &far.path("pipe@follow"))?;
    let rounds = bench.alternate(45, 30, vec![(1.0, floor)], subject)?;
    let floor = "a bare FUSE server's, behind an append and fdatasync";
    Ok(Row::of_rounds(Kind::Latency, 1.2, floor, &rounds))
}

/// From a write on one mount to the end of a read that was blocked on the other.
fn wake_op(near: &Path, far: &Path) -> Result<Op> {
    let mut write = write_op(near)?;
    let sleeper = Sleeper::start(far)?;
    let mut reads = 0;
    Ok(Box::new(move || {
        reads += 1;
        sleeper.wait_until_blocked(reads)?;
        let start = Instant::now();
        write()?;
        Ok(sleeper.woken_at()?.duration_since(start))
    }))
}

/// The same store, behind a gateway and without one.
fn http_write(bench: &Bench) -> Result<Row> {
    let source = bench.sqlite("http-write");
    let gateway = bench.gateway(&source)?;
    let (near, far) = (bench.mount(&source)?, bench.mount(&gateway.url)?);
    let floors = vec![(1.0, write_op(&near.path("floor"))?)];
    let rounds = bench.alternate(45, 100, floors, write_op(&far.path("pipe"))?)?;
    let floor = "1 write to a sqlite mount";
    Ok(Row::of_rounds(Kind::Latency, 2.5, floor, &rounds))
}

fn http_cat_in(bench: &Bench) -> Result<Row> {
    let lines = bench.scaled(1_000_000);
    let file = bench.lines_file(lines)?;
    let data = fs::read(&file)?;
    let source = bench.sqlite("http-cat-in");
    let gateway = bench.gateway(&source)?;
    let (near, far) = (bench.mount(&source)?, bench.mount(&gateway.url)?);
    let mut rounds = Vec::new();
    for round in 0..5 {
        let floor = cat(&[&file], &near.path(&format!("floor{round}")))?;
        let measured = cat(&[&file], &far.path(&format!("pipe{round}")))?;
        same_bytes(&near.path(&format!("pipe{round}@snapshot")), &data)?;
        rounds.push((rate(lines, floor), rate(lines, measured)));
    }
    Ok(Row::of_rounds(
        Kind::Rate,
        3e5,
        "cat into a sqlite mount",
        &rounds,
    ))
}

fn http_follow_out(bench: &Bench) -> Result<Row> {
    let lines = bench.scaled(1_000_000);
    let file = bench.lines_file(lines)?;
    let source = bench.sqlite("http-follow-out");
    let gateway = bench.gateway(&source)?;
    let (near, far) = (bench.mount(&source)?, bench.mount(&gateway.url)?);
    cat(&[&file], &near.path("pipe"))?;
    same_bytes(&far.path("pipe@snapshot"), &fs::read(&file)?)?;
    let mut rounds = Vec::new();
    for _ in 0..7 {
        let floor = follow(lines, &near.path("pipe@follow"))?;
        let measured = follow(lines, &far.path("pipe@follow"))?;
        rounds.push((rate(lines, floor), rate(lines, measured)));
    }
    Ok(Row::of_rounds(
        Kind::Rate,
        1e6,
        "the same of a sqlite mount",
        &rounds,
    ))
}

fn http_wake(bench: &Bench) -> Result<Row> {
    let gateway = bench.gateway(&bench.sqlite("http-wake"))?;
    let (near, far) = (bench.mount(&gateway.url)?, bench.mount(&gateway.url)?);
    let subject = wake_op(&near.path("pipe"), &far.path("pipe@follow"))?;
    let millisecond: Op = Box::new(|| Ok(Duration::from_millis(1)));
    let rounds = bench.alternate(45, 30, vec![(1.0, millisecond)], subject)?;
    Ok(Row::of_rounds(Kind::Latency, 1.0, "1 ms", &rounds))
}

fn memory_100_readers(bench: &Bench) -> Result<Row> {
    let mount = bench.mount(&bench.big_pipe()?)?;
    let pipe = mount.path("pipe@snapshot");
    let mut readers = Vec::new();
    for _ in 0..100 {
        let mut reader = at(&pipe, File::open(&pipe))?;
        read_some(&mut reader, 64 << 10)?;
        readers.push(reader);
    }
    // A daemon that reads ahead gets the time to fill every reader's buffer.
    thread::sleep(Duration::from_secs(1));
    for _ in 0..64 {
        for reader in &mut readers {
            read_some(reader, 64 << 10)?;
        }
    }
    Ok(Row::of_memory(mount.peak_mib()?, 512.0))
}

fn memory_1_reader(bench: &Bench) -> Result<Row> {
    let mount = bench.mount(&bench.big_pipe()?)?;
    let pipe = mount.path("pipe@snapshot");
    let mut reader = at(&pipe, File::open(&pipe))?;
    let expected = bench.big_copies() * BIG_LINES * LINE.len();
    let got = read_some(&mut reader, expected)? + reader.read(&mut [0])?;
    if got != expected {
        return at(&pipe, Err(format!("{got} bytes, not {expected}")));
    }
    Ok(Row::of_memory(mount.peak_mib()?, 64.0))
}

// ---- What the rows share ----

struct Bench {
    exe: PathBuf,
    dnpipes: PathBuf,
    dir: TempDir,
    quick: bool,
}

impl Bench {
    fn new(args: &Args) -> Result<Bench> {
        let exe = std::env::current_exe()?; // TARGET/release/examples/bench
        let above = |levels| exe.ancestors().nth(levels).unwrap_or(Path::new("."));
        let dnpipes = args.dnpipes.clone().unwrap_or(above(2).join("dnpipes"));
        let parent = args.dir.as_deref().unwrap_or(above(3));
        let parent = at(parent, fs::canonicalize(parent))?;
        Ok(Bench {
            dnpipes: at(&dnpipes, fs::canonicalize(&dnpipes))?,
            dir: tempfile::Builder::new()
                .prefix("dnpipes-bench-")
                .tempdir_in(parent)?,
            quick: args.quick,
            exe,
        })
    }

    fn scaled(&self, operations: usize) -> usize {
        operations / if self.quick { 10 } else { 1 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn sqlite(&self, name: &str) -> String {
        format!("sqlite:{}.db", self.path(name).display())
    }

    fn mount(&self, source: &str) -> Result<Mount> {
        Mount::start(&self.dnpipes, &["mount", source], self.dir.path())
    }

    fn gateway(&self, source: &str) -> Result<Gateway> {
        Gateway::start(&self.dnpipes, source)
    }

    /// A fresh one for each row, as the subject's daemon is a fresh one.
    fn noop(&self) -> Result<Mount> {
        Mount::start(&self.exe, &["--noop-fuse"], self.dir.path())
    }

    /// Numbered lines, so that a lost, doubled or misplaced one shows.
    fn lines_file(&self, lines: usize) -> Result<PathBuf> {
        let path = self.path(&format!("{lines}.lines"));
        let mut file = BufWriter::with_capacity(MIB, File::create(&path)?);
        for number in 0..lines {
            writeln!(file, "{number:0width$}", width = LINE.len() - 1)?;
        }
        // Written out now, or it is written out while something is timed.
        file.into_inner()?.sync_all()?;
        Ok(path)
    }

    fn big_copies(&self) -> usize {
        if self.quick { 1 } else { 16 }
    }

    /// The source whose `pipe` holds the big log. The daemon that stored it has ended.
    fn big_pipe(&self) -> Result<String> {
        let file = self.path(&format!("{BIG_LINES}.lines"));
        if !file.exists() {
            let mount = self.mount(&self.sqlite("big"))?;
            let copies = vec![self.lines_file(BIG_LINES)?; self.big_copies()];
            cat(&copies, &mount.path("pipe"))?;
        }
        Ok(self.sqlite("big"))
    }

    /// A round's floor is the weighted sum of its floors' medians.
    ///
    /// On which CPUs the scheduler puts caller and server can double a request's time, and it stays with its
    /// choice for a while. Hence many short rounds: with few long ones two equal sides were seen 12 % apart.
    fn alternate(
        &self,
        rounds: usize,
        operations: usize,
        mut floors: Vec<(f64, Op)>,
        mut subject: Op,
    ) -> Result<Vec<(f64, f64)>> {
        // The first calls of a round find the other side's data in the caches: enough must follow.
        let operations = self.scaled(operations).max(10);
        let mut results = Vec::new();
        for _ in 0..=rounds {
            let mut floor = 0.0;
            for (weight, op) in &mut floors {
                floor += *weight * median_us(op, operations)?;
            }
            results.push((floor, median_us(&mut subject, operations)?));
        }
        // The first round warmed both sides up.
        Ok(results.split_off(1))
    }

    /// File system type, kernel, CPUs.
    fn machine(&self) -> [String; 3] {
        let dir = self.dir.path().as_os_str();
        [
            last_line("df", &[OsStr::new("--output=fstype"), dir]),
            last_line("uname", &[OsStr::new("-r")]),
            last_line("nproc", &[]),
        ]
    }
}

fn last_line(program: &str, args: &[&OsStr]) -> String {
    let output = child(Path::new(program)).args(args).output();
    let text = output.map_or(String::new(), |o| String::from_utf8_lossy(&o.stdout).into());
    text.lines().last().unwrap_or("unknown").into()
}

/// Says which file an error is about.
fn at<T>(path: &Path, result: std::result::Result<T, impl Display>) -> Result<T> {
    result.map_err(|error| format!("{}: {error}", path.display()).into())
}

fn rate(messages: usize, time: Duration) -> f64 {
    messages as f64 / time.as_secs_f64()
}

/// Runs the real cat, with its output opened as a shell's `>` opens it.
fn cat(files: &[impl AsRef<OsStr>], output: &Path) -> Result<Duration> {
    let stdout = at(output, File::create(output))?;
    let mut command = child(Path::new("cat"));
    command.args(files).stdout(stdout);
    let start = Instant::now();
    let status = command.status()?;
    let time = start.elapsed();
    match status.success() {
        true => Ok(time),
        false => at(output, Err(format!("cat: {status}"))),
    }
}

/// Follows a pipe for so many lines, from its opening on.
fn follow(lines: usize, pipe: &Path) -> Result<Duration> {
    let start = Instant::now();
    let mut reader = at(pipe, File::open(pipe))?;
    let read = read_some(&mut reader, lines * LINE.len())?;
    let time = start.elapsed();
    match read == lines * LINE.len() {
        true => Ok(time),
        false => at(pipe, Err(format!("{read} bytes are more than there are"))),
    }
}

fn append_in_pieces(path: &Path, data: &[u8]) -> Result<Duration> {
    let mut file = at(path, File::create(path))?;
    let start = Instant::now();
    for piece in data.chunks(CAT_BUFFER) {
        file.write_all(piece)?;
        file.sync_data()?;
    }
    Ok(start.elapsed())
}

/// Reads on to at least so many bytes, in pieces of at most 128 KiB. Returns how many there were.
fn read_some(reader: &mut File, bytes: usize) -> Result<usize> {
    let mut buffer = vec![0; bytes.min(CAT_BUFFER)];
    let mut total = 0;
    while total < bytes {
        match reader.read(&mut buffer)? {
            0 => return Err(format!("end of file after {total} of {bytes} bytes").into()),
            read => total += read,
        }
    }
    Ok(total)
}

/// A fast copy of the wrong bytes measures nothing.
fn same_bytes(path: &Path, expected: &[u8]) -> Result<()> {
    let mut file = at(path, File::open(path))?;
    let mut buffer = vec![0; CAT_BUFFER];
    let mut offset = 0;
    loop {
        let read = at(path, file.read(&mut buffer))?;
        if !expected[offset..].starts_with(&buffer[..read])
            || (read == 0) != (offset == expected.len())
        {
            return at(
                path,
                Err(format!("not what was pushed, after byte {offset}")),
            );
        }
        if read == 0 {
            return Ok(());
        }
        offset += read;
    }
}

/// A thread blocked in read(2) on a pipe. It ends when a read fails, as it does without its mount.
struct Sleeper {
    reads: Arc<AtomicUsize>,
    woken: Receiver<(io::Result<usize>, Instant)>,
}

impl Sleeper {
    fn start(path: &Path) -> Result<Sleeper> {
        let mut file = at(path, File::open(path))?;
        let reads = Arc::new(AtomicUsize::new(0));
        let (started, (sender, woken)) = (Arc::clone(&reads), mpsc::channel());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                started.fetch_add(1, Ordering::Release);
                let read = file.read(&mut buffer);
                let now = Instant::now();
                let last = !matches!(read, Ok(1..));
                if sender.send((read, now)).is_err() || last {
                    return;
                }
            }
        });
        Ok(Sleeper { reads, woken })
    }

    fn wait_until_blocked(&self, reads: usize) -> Result<()> {
        let start = Instant::now();
        while self.reads.load(Ordering::Acquire) < reads {
            if start.elapsed() > DEADLINE {
                return Err("the reader stopped".into());
            }
            thread::sleep(Duration::from_micros(100));
        }
        // It is about to read. Blocked in the daemon it is some tens of microseconds later.
        thread::sleep(REST);
        Ok(())
    }

    fn woken_at(&self) -> Result<Instant> {
        match self.woken.recv_timeout(DEADLINE)? {
            (Ok(read), now) if read == LINE.len() => Ok(now),
            (read, _) => Err(format!("the blocked read of one line gave {read:?}").into()),
        }
    }
}

/// Does something once and says how long it took.
type Op = Box<dyn FnMut() -> Result<Duration>>;

/// How long a reader is given to get from its thread into the daemon.
const REST: Duration = Duration::from_micros(1500);

/// The same after a rest, which is not counted.
fn rested(mut op: Op) -> Op {
    Box::new(move || {
        thread::sleep(REST);
        op()
    })
}

/// One line, one write(2), one open file.
fn write_op(path: &Path) -> Result<Op> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    let mut file = at(path, options.open(path))?;
    Ok(Box::new(move || {
        let start = Instant::now();
        let written = file.write(&LINE)?;
        let time = start.elapsed();
        match written == LINE.len() {
            true => Ok(time),
            false => Err(format!("a write of one line took {written} bytes").into()),
        }
    }))
}

fn append_op(path: &Path) -> Result<Op> {
    let options = OpenOptions::new().append(true).create(true).clone();
    let mut file = at(path, options.open(path))?;
    Ok(Box::new(move || {
        let start = Instant::now();
        file.write_all(&LINE)?;
        file.sync_data()?;
        Ok(start.elapsed())
    }))
}

fn median_us(op: &mut Op, operations: usize) -> Result<f64> {
    let mut times = Vec::with_capacity(operations);
    for _ in 0..operations {
        times.push(op()?.as_secs_f64() * 1e6);
    }
    Ok(sorted(times)[operations / 2])
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

// ---- Results ----

#[derive(Clone, Copy)]
enum Kind {
    /// In microseconds; the bar is on the ratio to the floor.
    Latency,
    /// In messages a second; the bar is on the rate.
    Rate,
    /// In messages a second; the bar is on the ratio to the floor.
    Relative,
    /// In MiB; the bar is on the size, and there is no floor.
    Memory,
}

struct Row {
    kind: Kind,
    measured: f64,
    bar: f64,
    floor: Option<Floor>,
}

struct Floor {
    what: &'static str,
    value: f64,
    ratio: f64,
    min: f64,
    max: f64,
}

const HEADER: &str = "\
row                           measured       floor     ratio (min..max)  bar            verdict floor is";

impl Row {
    /// From pairs of floor and measured.
    fn of_rounds(kind: Kind, bar: f64, what: &'static str, rounds: &[(f64, f64)]) -> Row {
        let column =
            |field: fn(f64, f64) -> f64| sorted(rounds.iter().map(|r| field(r.0, r.1)).collect());
        let ratios = column(|floor, measured| measured / floor);
        let middle = rounds.len() / 2;
        let floor = Some(Floor {
            what,
            value: column(|floor, _| floor)[middle],
            ratio: ratios[middle],
            min: ratios[0],
            max: ratios[rounds.len() - 1],
        });
        Row {
            kind,
            measured: column(|_, measured| measured)[middle],
            bar,
            floor,
        }
    }

    fn of_memory(peak_mib: f64, bar: f64) -> Row {
        Row {
            kind: Kind::Memory,
            measured: peak_mib,
            bar,
            floor: None,
        }
    }

    fn is_ok(&self) -> bool {
        match self.kind {
            Kind::Latency => self.floor.as_ref().is_some_and(|f| f.ratio <= self.bar),
            Kind::Rate => self.measured >= self.bar,
            Kind::Relative => self.floor.as_ref().is_some_and(|f| f.ratio >= self.bar),
            Kind::Memory => self.measured <= self.bar,
        }
    }

    fn bar(&self) -> String {
        match self.kind {
            Kind::Latency => format!("<= {:.1} x floor", self.bar),
            Kind::Rate => format!(">= {}", self.amount(self.bar)),
            Kind::Relative => format!(">= {:.1} x floor", self.bar),
            Kind::Memory => format!("<= {}", self.amount(self.bar)),
        }
    }

    fn amount(&self, value: f64) -> String {
        match self.kind {
            Kind::Latency => format!("{value:.1} us"),
            Kind::Rate | Kind::Relative if value < 1e4 => format!("{value:.0} /s"),
            Kind::Rate | Kind::Relative => format!("{:.2} M/s", value / 1e6),
            Kind::Memory => format!("{value:.1} MiB"),
        }
    }

    /// Under HEADER.
    fn line(&self, id: &str) -> String {
        let (measured, bar) = (self.amount(self.measured), self.bar());
        let verdict = if self.is_ok() { "ok" } else { "MISSED" };
        let (floor, ratio, what) = match &self.floor {
            Some(f) => (
                self.amount(f.value),
                format!("{:.2} ({:.2}..{:.2})", f.ratio, f.min, f.max),
                f.what,
            ),
            None => ("-".into(), "-".into(), "-"),
        };
        format!("{id:<26} {measured:>11} {floor:>11} {ratio:>20}  {bar:<14} {verdict:<7} {what}")
    }

    fn json(&self, id: &str) -> Value {
        let unit = match self.kind {
            Kind::Latency => "us",
            Kind::Rate | Kind::Relative => "messages/s",
            Kind::Memory => "MiB",
        };
        let mut row = json!({
            "id": id, "unit": unit, "measured": self.measured, "bar": self.bar(), "ok": self.is_ok(),
        });
        if let Some(f) = &self.floor {
            row["floor"] = json!({ "is": f.what, "value": f.value });
            row["ratio"] = json!({ "median": f.ratio, "min": f.min, "max": f.max });
        }
        row
    }
}

// ---- Processes, mounts, signals: nothing outlives the run ----

static STOPPED: AtomicBool = AtomicBool::new(false);
static DAEMONS: Mutex<Vec<u32>> = Mutex::new(Vec::new());

fn refuse_if_stopped() -> Result<()> {
    match STOPPED.load(Ordering::SeqCst) {
        true => Err("stopped by a signal".into()),
        false => Ok(()),
    }
}

fn with_daemons<T>(f: impl FnOnce(&mut Vec<u32>) -> T) -> T {
    f(&mut DAEMONS.lock().unwrap_or_else(PoisonError::into_inner))
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: kill takes no pointers.
    unsafe { libc::kill(pid as libc::pid_t, signal) };
}

/// Blocks the signals that ask to end, in this thread and those it starts.
fn block_signals() -> libc::sigset_t {
    // SAFETY: every pointer is to `set`, which sigemptyset makes valid.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    }
}

/// Waits for one of the signals. False: the time is over.
fn await_signal(set: &libc::sigset_t, time: Duration) -> bool {
    let time = libc::timespec {
        tv_sec: time.as_secs() as libc::time_t,
        tv_nsec: 0,
    };
    // SAFETY: both pointers are to live values, and a null siginfo is allowed.
    unsafe { libc::sigtimedwait(set, std::ptr::null_mut(), &time) > 0 }
}

/// A thread of its own takes the signals, as a call that hangs in a daemon runs no handler. Without the
/// daemons every such call fails, and its caller cleans up as after any error.
fn stop_on_signal() {
    let set = block_signals();
    thread::spawn(move || {
        while !await_signal(&set, DEADLINE) {}
        STOPPED.store(true, Ordering::SeqCst);
        with_daemons(|pids| pids.iter().for_each(|pid| kill(*pid, libc::SIGTERM)));
        await_signal(&set, DEADLINE);
        with_daemons(|pids| pids.iter().for_each(|pid| kill(*pid, libc::SIGKILL)));
    });
}

/// A command that takes signals as usual, and gets SIGTERM should this process die without its guards.
fn child(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    // SAFETY: the closure makes async-signal-safe calls only, with pointers to its own live values.
    unsafe {
        command.pre_exec(|| {
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::pthread_sigmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        })
    };
    command
}

/// A gateway's process.
struct Gateway {
    process: Child,
    url: String,
}

impl Gateway {
    fn start(program: &Path, source: &str) -> Result<Gateway> {
        let mut command = child(program);
        command.args(["serve", source, "--listen", "127.0.0.1:0"]);
        command.stdout(Stdio::piped());
        let process = with_daemons(|pids| {
            refuse_if_stopped()?;
            let process = at(program, command.spawn())?;
            pids.push(process.id());
            Ok::<_, Box<dyn Error>>(process)
        })?;
        let mut gateway = Gateway {
            process,
            url: String::new(),
        };
        let mut line = String::new();
        let stdout = gateway.process.stdout.as_mut().ok_or("no output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let url = line.trim().strip_prefix("listening on ");
        gateway.url = url.ok_or("the gateway did not start")?.to_owned();
        Ok(gateway)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let pid = self.process.id();
        kill(pid, libc::SIGKILL);
        // It is reaped now; there is no more to do about a failure.
        let _ = self.process.wait();
        with_daemons(|pids| pids.retain(|other| *other != pid));
    }
}

/// A live mount and the process behind it.
struct Mount {
    daemon: Child,
    mountpoint: TempDir,
}

impl Mount {
    /// Runs `program args MOUNTPOINT` and returns when the mount answers.
    fn start(program: &Path, args: &[impl AsRef<OsStr>], parent: &Path) -> Result<Mount> {
        let mountpoint = tempfile::tempdir_in(parent)?;
        let mut command = child(program);
        command.args(args).arg(mountpoint.path());
        let daemon = with_daemons(|pids| {
            refuse_if_stopped()?;
            let daemon = at(program, command.spawn())?;
            pids.push(daemon.id());
            Ok::<_, Box<dyn Error>>(daemon)
        })?;
        let mut mount = Mount { daemon, mountpoint };
        let start = Instant::now();
        while !is_live(mount.mountpoint.path(), parent) {
            if !mount.is_running() || start.elapsed() > DEADLINE {
                return Err(format!("{command:?} did not mount").into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(mount)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.mountpoint.path().join(name)
    }

    /// The most memory that the daemon ever had resident.
    fn peak_mib(&self) -> Result<f64> {
        let path = PathBuf::from(format!("/proc/{}/status", self.daemon.id()));
        let status = at(&path, fs::read_to_string(&path))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(kib.ok_or("no VmHWM")?.parse::<f64>()? / 1024.0)
    }

    fn is_running(&mut self) -> bool {
        matches!(self.daemon.try_wait(), Ok(None))
    }

    fn signal_and_wait(&mut self, signal: i32) -> bool {
        let start = Instant::now();
        if self.is_running() {
            kill(self.daemon.id(), signal);
        }
        while self.is_running() && start.elapsed() < DEADLINE {
            thread::sleep(Duration::from_millis(5));
        }
        !self.is_running()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let pid = self.daemon.id();
        if !self.signal_and_wait(libc::SIGTERM) {
            eprintln!("bench: process {pid} ignored SIGTERM: killed");
            self.signal_and_wait(libc::SIGKILL);
        }
        with_daemons(|pids| pids.retain(|other| *other != pid));
        let mountpoint = self.mountpoint.path();
        if detach(mountpoint) {
            eprintln!("bench: {} was left mounted: detached", mountpoint.display());
        }
    }
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path that exists holds no NUL")
}

fn is_live(mountpoint: &Path, parent: &Path) -> bool {
    let dev = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    let is_mounted = dev(mountpoint).is_some_and(|own| Some(own) != dev(parent));
    let path = c_path(mountpoint);
    // SAFETY: an all-zero statfs is valid, and both pointers live through the call.
    is_mounted && unsafe { libc::statfs(path.as_ptr(), &mut std::mem::zeroed()) } == 0
}

/// Takes away what is mounted there, and says whether something was.
fn detach(mountpoint: &Path) -> bool {
    let path = c_path(mountpoint);
    // SAFETY: the pointer lives through the call.
    let is_gone = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) } == 0;
    if is_gone || io::Error::last_os_error().raw_os_error() != Some(libc::EPERM) {
        return is_gone;
    }
    // Not root, whose mounts fusermount3 makes and takes away.
    let mut command = child(Path::new("fusermount3"));
    let output = command.arg("-quz").arg(mountpoint).output();
    output.is_ok_and(|output| output.status.success())
}
