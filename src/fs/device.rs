//! The device that requests come from, and the program's own read(2), which has a hand in how they come.
//!
//! fuser 0.18 answers an interrupt with ENOSYS, after which the kernel never sends another, and blocked callers of
//! the mount cannot even be killed. So interrupts are taken out of the device's stream before fuser sees them: the
//! program's own `read` symbol, which fuser's calls are linked to, looks at what comes from the device. It is also
//! where a thread that waits for requests may run a [`Pump`]. It goes away the day fuser has a callback for both.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

use fuser::Errno;

use super::interrupt::Interrupts;
use super::pump::Pump;

/// The FUSE device's descriptor; -1 without one.
static DEVICE: AtomicI32 = AtomicI32::new(-1);
/// Whether a request was seen to come through our `read`.
static SEEN: AtomicBool = AtomicBool::new(false);
static TARGETS: OnceLock<Targets> = OnceLock::new();

struct Targets {
    interrupts: Arc<Interrupts>,
    pump: Option<Arc<Pump>>,
}

/// From now on interrupts read from `device` go to `interrupts`, and who waits for requests runs `pump`. A process
/// has one mount.
pub(super) fn watch(device: BorrowedFd<'_>, interrupts: Arc<Interrupts>, pump: Option<Arc<Pump>>) {
    if TARGETS.set(Targets { interrupts, pump }).is_err() {
        log::error!("a second mount in one process: its blocked readers cannot be interrupted");
        return;
    }
    DEVICE.store(device.as_raw_fd(), Ordering::Release);
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

/// Whether the thread's last system call found nothing yet.
fn found_nothing() -> bool {
    io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock
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
        let targets = match fd == DEVICE.load(Ordering::Acquire) {
            true => TARGETS.get(),
            false => None,
        };
        let pump = targets.and_then(|targets| targets.pump.as_deref());
        if let Some(pump) = pump {
            pump.take_turn();
        }
        // SAFETY: the caller's promise, passed on. The system call sets errno.
        let got = unsafe { libc::syscall(libc::SYS_read, fd, buffer, count) } as libc::ssize_t;
        match (pump, targets) {
            (Some(pump), _) if got < 0 && found_nothing() => {
                if let Err(error) = pump.run_until_request() {
                    log::error!("waiting for requests: {error}");
                    // SAFETY: it is the thread's own.
                    unsafe { *libc::__errno_location() = Errno::EIO.code() };
                    return got;
                }
            }
            (_, Some(targets)) if got > 0 => {
                SEEN.store(true, Ordering::Relaxed);
                // SAFETY: the kernel has just written `got` bytes there.
                let request =
                    unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), got as usize) };
                match interrupted_request(request) {
                    Some(unique) => targets.interrupts.interrupt(unique),
                    None => return got,
                }
            }
            _ => return got,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
