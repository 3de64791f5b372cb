//! Interrupts: ending a blocked request when its caller gets a signal.
//!
//! The kernel tells by FUSE_INTERRUPT. fuser 0.18 answers that with ENOSYS, after which the kernel never
//! sends another, and blocked callers of the mount cannot even be killed. So this module takes them out of
//! the device's stream before fuser sees them: the program's own `read` symbol, which fuser's calls are
//! linked to, looks at what comes from the device. It goes away the day fuser has a callback for it.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::oneshot;

/// Requests that are parked and can be interrupted, by the kernel's number for them.
#[derive(Default)]
pub(super) struct Interrupts {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    parked: HashMap<u64, oneshot::Sender<()>>,
    /// Interrupts that came before their request was parked, or after it was answered.
    early: VecDeque<u64>,
}

/// How many interrupts without a request are remembered. Late ones are of no use and age out; an early
/// one waits only while another thread carries its request from the device to [`Interrupts::park`].
const EARLY: usize = 1024;

/// A parked request, until it is dropped.
pub(super) struct Parked {
    interrupts: Arc<Interrupts>,
    unique: u64,
    interrupted: oneshot::Receiver<()>,
}

impl Interrupts {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Parks request `unique`.
    pub(super) fn park(self: &Arc<Self>, unique: u64) -> Parked {
        let (sender, interrupted) = oneshot::channel();
        let mut state = self.lock();
        match state.early.iter().position(|early| *early == unique) {
            // The dropped sender tells.
            Some(at) => drop(state.early.remove(at)),
            None => drop(state.parked.insert(unique, sender)),
        }
        drop(state);
        Parked {
            interrupts: Arc::clone(self),
            unique,
            interrupted,
        }
    }

    fn interrupt(&self, unique: u64) {
        let mut state = self.lock();
        if state.parked.remove(&unique).is_none() {
            if state.early.len() == EARLY {
                state.early.pop_front();
            }
            state.early.push_back(unique);
        }
    }
}

impl Parked {
    /// Returns when the request's caller got a signal.
    pub(super) async fn interrupted(&mut self) {
        // Sent or dropped, both mean the same.
        let _told = (&mut self.interrupted).await;
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.interrupts.lock().parked.remove(&self.unique);
    }
}

/// The FUSE device's descriptor; -1 without one.
static DEVICE: AtomicI32 = AtomicI32::new(-1);
/// Whether a request was seen to come through our `read`.
static SEEN: AtomicBool = AtomicBool::new(false);
static TARGET: OnceLock<Arc<Interrupts>> = OnceLock::new();

/// From now on interrupts read from `device` go to `interrupts`. A process has one mount.
pub(super) fn watch(device: i32, interrupts: Arc<Interrupts>) {
    if TARGET.set(interrupts).is_err() {
        log::error!("a second mount in one process: its blocked readers cannot be interrupted");
        return;
    }
    DEVICE.store(device, Ordering::Release);
}

/// Ends [`watch`], before the descriptor's number is used for something else.
pub(super) fn unwatch() {
    DEVICE.store(-1, Ordering::Release);
}

/// Whether the device's requests come through our `read`, as they must once one was answered.
pub(super) fn works() -> bool {
    SEEN.load(Ordering::Relaxed)
}

/// struct fuse_in_header and fuse_interrupt_in, of linux/fuse.h.
const OPCODE: std::ops::Range<usize> = 4..8;
const INTERRUPT_UNIQUE: std::ops::Range<usize> = 40..48;
const FUSE_INTERRUPT: u32 = 36;

/// The request that an interrupt names, if `request` is an interrupt.
fn interrupted_request(request: &[u8]) -> Option<u64> {
    let opcode = request.get(OPCODE)?.try_into().ok()?;
    if u32::from_ne_bytes(opcode) != FUSE_INTERRUPT {
        return None;
    }
    let unique = request.get(INTERRUPT_UNIQUE)?.try_into().ok()?;
    Some(u64::from_ne_bytes(unique))
}

/// read(2) for the whole program. Everything but the FUSE device passes straight through.
///
/// # Safety
/// As for read(2): `buffer` is valid for writes of `count` bytes.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn read(
    fd: libc::c_int,
    buffer: *mut libc::c_void,
    count: libc::size_t,
) -> libc::ssize_t {
    loop {
        // SAFETY: the caller's promise, passed on. The system call sets errno.
        let got = unsafe { libc::syscall(libc::SYS_read, fd, buffer, count) } as libc::ssize_t;
        if got <= 0 || fd != DEVICE.load(Ordering::Acquire) {
            return got;
        }
        SEEN.store(true, Ordering::Relaxed);
        // SAFETY: the kernel has just written `got` bytes there.
        let request = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), got as usize) };
        match (interrupted_request(request), TARGET.get()) {
            (Some(unique), Some(interrupts)) => interrupts.interrupt(unique),
            _ => return got,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> Arc<Interrupts> {
        Arc::default()
    }

    #[tokio::test]
    async fn an_interrupt_reaches_the_parked_request_and_no_other() {
        let interrupts = registry();
        let mut hit = interrupts.park(7);
        let mut other = interrupts.park(8);
        interrupts.interrupt(7);
        hit.interrupted().await;
        assert!(
            other
                .interrupted
                .try_recv()
                .is_err_and(|e| e == oneshot::error::TryRecvError::Empty)
        );
    }

    #[tokio::test]
    async fn an_interrupt_that_comes_first_is_remembered() {
        let interrupts = registry();
        interrupts.interrupt(7);
        interrupts.park(7).interrupted().await;
        assert!(interrupts.lock().early.is_empty());
    }

    #[test]
    fn late_interrupts_age_out_and_answered_requests_leave_nothing() {
        let interrupts = registry();
        drop(interrupts.park(1));
        assert!(interrupts.lock().parked.is_empty());
        for unique in 0..3 * EARLY as u64 {
            interrupts.interrupt(unique);
        }
        assert_eq!(interrupts.lock().early.len(), EARLY);
    }

    #[test]
    fn only_an_interrupt_is_taken_for_one() {
        let mut request = [0u8; 48];
        request[OPCODE].copy_from_slice(&FUSE_INTERRUPT.to_ne_bytes());
        request[INTERRUPT_UNIQUE].copy_from_slice(&99u64.to_ne_bytes());
        assert_eq!(interrupted_request(&request), Some(99));
        assert_eq!(interrupted_request(&request[..40]), None);
        request[4] = 15;
        assert_eq!(interrupted_request(&request), None);
    }
}
