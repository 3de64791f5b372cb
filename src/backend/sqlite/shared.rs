//! The bell's file in memory: numbers that all processes of a store see.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use super::recent;

/// Pipes share this many slots; two in one slot wake each other's readers for nothing, no more.
pub(super) const SLOTS: usize = 512;
pub(super) const SLOT: usize = size_of::<u64>();

/// Numbers behind the slots: of resets, twice; of those who wait; of processes that queue for the turn or have it. A
/// process that dies leaves too great a number of the latter two, never too small a one.
pub(super) const RESETS: usize = SLOTS;
pub(super) const LISTENERS: usize = SLOTS + 1;
pub(super) const QUEUED: usize = SLOTS + 2;

/// Where [`recent`]'s begin.
const SHOWN: usize = 2 * SLOTS;
const MAPPED: usize = (SHOWN + recent::NUMBERS) * SLOT;

/// The numbers, until it is dropped.
pub(super) struct Shared(NonNull<AtomicU64>);

// SAFETY: it points to atomics in memory that stays mapped until it is dropped.
unsafe impl Send for Shared {}
// SAFETY: as above; atomics may be shared.
unsafe impl Sync for Shared {}

impl Shared {
    /// Of the bell's file, which gets long enough.
    ///
    /// # Errors
    /// Those of posix_fallocate(3) and mmap(2).
    pub(super) fn map(file: &File) -> io::Result<Self> {
        // SAFETY: the descriptor is open. The blocks are allocated, so that a full disk is an error here
        // and not a signal at the first use, but for file systems that copy on write; what the file holds stays.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, MAPPED as libc::off_t) } {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
        // SAFETY: a new shared mapping of an open file, as long as the file is.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MAPPED,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(start.cast::<AtomicU64>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Shared(start)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Where the newest pushes are shown.
    pub(super) fn cells(&self) -> &[AtomicU64] {
        // SAFETY: within the mapping, aligned, and only ever used as atomics.
        unsafe { std::slice::from_raw_parts(self.0.add(SHOWN).as_ptr(), recent::NUMBERS) }
    }

    /// The number at `index`: of a slot, or [`RESETS`], [`LISTENERS`] or [`QUEUED`].
    pub(super) fn number(&self, index: usize) -> &AtomicU64 {
        assert!(index < SHOWN);
        // SAFETY: within the mapping, aligned, and only ever used as an atomic.
        unsafe { self.0.add(index).as_ref() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made, which nobody refers to any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), MAPPED) };
    }
}
