//! Interrupts: ending a blocked request when its caller gets a signal.
//!
//! The kernel tells by FUSE_INTERRUPT, which [`super::device`] takes out of the stream of requests.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

    /// The caller of request `unique` got a signal.
    pub(super) fn interrupt(&self, unique: u64) {
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
}
