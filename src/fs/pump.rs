//! One thread for all of a mount on a remote backend: the one that reads requests also runs what they wait for.
//!
//! Elsewhere a request crosses from the thread that reads it to one that has the connection, and each crossing is a
//! wake-up, which takes longer than all that a push does here by itself. So the runtime is one of the current thread,
//! and that thread waits for requests and for answers of the backend together. For an answer it looks again and again at
//! first, instead of sleeping.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Runtime;

/// So many requests are read before others get a turn: with one that is answered at once there may be a next one,
/// for ever.
const BURST: u32 = 16;

/// How long the thread looks for an answer to what was just begun, and the request that follows, before it sleeps: to be
/// woken takes as long as a server on the same host needs for a push.
const SPIN: Duration = Duration::from_micros(200);

/// The same where the last request came within this time: a server that waits for its disk is as soon.
const LONG_SPIN: Duration = Duration::from_micros(500);

/// A request, or that the mount has ended.
const EVENTS: Interest = Interest::READABLE.add(Interest::ERROR);

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

pub(super) struct Pump {
    /// Of the current thread: of whoever waits for requests.
    runtime: Arc<Runtime>,
    /// What requests come from, once it is there.
    device: OnceLock<AsyncFd<OwnedFd>>,
    /// What was begun since the runtime ran last.
    begun: Mutex<Vec<Work>>,
    /// How many requests were asked for since then.
    asked: AtomicU32,
    /// Whether there is another CPU for who is waited for.
    spins: bool,
    /// Whether what was begun last was soon followed by the next request.
    was_soon: AtomicBool,
}

impl Pump {
    /// A pump of `runtime`, which has a thread only while [`Pump::run_until_request`] is called.
    pub(super) fn new(runtime: &Arc<Runtime>) -> Self {
        Pump {
            runtime: Arc::clone(runtime),
            device: OnceLock::new(),
            begun: Mutex::default(),
            asked: AtomicU32::new(0),
            spins: std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1),
            was_soon: AtomicBool::new(false),
        }
    }

    /// Has requests come from `device`, which does not block from now on.
    ///
    /// # Errors
    /// Of fcntl(2) and epoll_ctl(2).
    pub(super) fn watch(&self, device: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: both calls take an open descriptor and a number.
        let changed = unsafe {
            let flags = libc::fcntl(device.as_raw_fd(), libc::F_GETFL);
            flags >= 0
                && libc::fcntl(device.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
        };
        if !changed {
            return Err(io::Error::last_os_error());
        }
        let device = device.try_clone_to_owned()?;
        let _context = self.runtime.enter();
        // SAFETY: the descriptor is closed by its owner only, after it was taken out of the runtime.
        let device = unsafe { AsyncFd::register_with_interest(device, EVENTS) };
        let watched = self.device.set(device.map_err(io::Error::from)?);
        watched.map_err(|_| io::Error::other("it watches one already"))
    }

    fn begun(&self) -> MutexGuard<'_, Vec<Work>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `work` run once this thread, which serves a request, waits for the next one. Spawned from outside, it
    /// would wake a runtime that is not asleep.
    pub(super) fn begin(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.begun().push(Box::pin(work));
    }

    /// To be called before each request is asked for: gives what has been begun a turn if it is due.
    pub(super) fn take_turn(&self) {
        if self.asked.fetch_add(1, Ordering::Relaxed) >= BURST {
            self.run(tokio::task::yield_now());
        }
    }

    /// Runs what has been begun until there may be a request.
    ///
    /// # Errors
    /// Where that can no longer be told.
    pub(super) fn run_until_request(&self) -> io::Result<()> {
        let Some(device) = self.device.get() else {
            return Err(io::Error::other("there is no device"));
        };
        let spins = self.spins && !self.begun().is_empty();
        let spin = match self.was_soon.load(Ordering::Relaxed) {
            true => LONG_SPIN,
            false => SPIN,
        };
        let since = Instant::now();
        let waited = self.run(async {
            let mut waiting = pin!(device.ready(EVENTS));
            while spins && since.elapsed() < spin {
                let looked = poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context)));
                if let Poll::Ready(ready) = looked.await {
                    ready?.clear_ready();
                    return Ok(());
                }
                tokio::task::yield_now().await;
            }
            waiting.await?.clear_ready();
            Ok(())
        });
        if spins {
            let is_soon = since.elapsed() < LONG_SPIN;
            self.was_soon.store(is_soon, Ordering::Relaxed);
        }
        waited
    }

    fn run<T>(&self, until: impl Future<Output = T>) -> T {
        self.asked.store(0, Ordering::Relaxed);
        self.runtime.block_on(async {
            for work in std::mem::take(&mut *self.begun()) {
                tokio::spawn(work);
            }
            until.await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;

    fn pump() -> Pump {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        Pump::new(&Arc::new(runtime.expect("a runtime")))
    }

    #[test]
    fn what_was_begun_runs_while_a_request_is_waited_for() {
        let (mut device, mut kernel) = UnixStream::pair().expect("a pair");
        let pump = pump();
        pump.watch(device.as_fd()).expect("watched");
        for request in *b"ab" {
            let mut kernel = kernel.try_clone().expect("a copy");
            pump.begin(async move {
                tokio::time::sleep(Duration::from_millis(1)).await;
                kernel.write_all(&[request]).expect("written");
            });
            let mut got = [0];
            // What was readable before may be told once more.
            while let Err(error) = device.read(&mut got) {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                pump.run_until_request().expect("a request");
            }
            assert_eq!(got, [request]);
        }
        kernel.write_all(b"c").expect("written");
        pump.run_until_request().expect("a request");
        assert!(pump.watch(device.as_fd()).is_err(), "it watches one device");
    }

    /// The time that this thread has had a CPU.
    fn busy() -> Duration {
        // SAFETY: it is plain data, for which all zeros is a valid value.
        let mut time: libc::timespec = unsafe { std::mem::zeroed() };
        // SAFETY: the clock is each thread's, and `time` outlives the call.
        let told = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        assert_eq!(told, 0);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }

    #[test]
    fn what_takes_long_is_waited_for_asleep() {
        let (device, mut kernel) = UnixStream::pair().expect("a pair");
        let pump = pump();
        pump.watch(device.as_fd()).expect("watched");
        pump.begin(std::future::pending());
        let since = busy();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                std::thread::sleep(Duration::from_millis(500));
                kernel.write_all(b"a").expect("written");
            });
            // What was readable before may be told once more.
            while (&device).read(&mut [0]).is_err() {
                pump.run_until_request().expect("a request");
            }
        });
        assert!(busy() - since < Duration::from_millis(250));
    }

    #[test]
    fn requests_without_end_leave_the_others_their_turn() {
        let pump = pump();
        let done = Arc::new(AtomicBool::new(false));
        let set = Arc::clone(&done);
        pump.begin(async move {
            tokio::task::yield_now().await;
            set.store(true, Ordering::Relaxed);
        });
        for _ in 0..BURST {
            pump.take_turn();
        }
        assert!(!done.load(Ordering::Relaxed), "each turn costs a request");
        for _ in 0..2 * BURST {
            pump.take_turn();
        }
        assert!(done.load(Ordering::Relaxed));
    }
}
