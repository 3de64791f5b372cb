//! The reading side of an open file: a task fills a bounded buffer, reads take from it.
//!
//! A read that finds bytes answers with them, and one for many bytes waits a moment for what is on its way. One that waits
//! is a future: dropping it takes nothing away.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use super::framing::{encode, framed_len, framed_total};
use super::silence::{Patience, Silence};
use super::subscription::{Step, Subscription};
use crate::backend::{Backend, Floor, weight};
use crate::error::{Error, Kind, Result};
use crate::message::{Message, Position};
use crate::name::PipeName;
use crate::selector::{Frame, Mode};

/// Weight of messages that are kept ready; the task goes on once half of it is read.
const BUFFER: usize = 2 << 20;

/// Weight of messages that are fetched at once.
const FETCH: usize = 512 << 10;

/// Larger requests are answered with no more than this, so that none is answered in full: the kernel cuts a longer
/// read(2) into requests of 1 MiB, less what its buffer lacks of a page's beginning, and after a full answer asks
/// again, which could wait.
const LONGEST_ANSWER: usize = (1 << 20) - 4096;

/// How long a read that could have something waits for more that is on its way.
const GATHERING: Duration = Duration::from_millis(200);

/// Weight of messages that are fetched at once only where there may be more of them.
const MUCH: usize = 64 << 10;

/// An open file's reading side.
pub struct Reader {
    shared: Arc<Shared>,
    floor: Arc<dyn Floor>,
    fill: AbortHandle,
    frame: Frame,
}

struct Shared {
    state: Mutex<State>,
    silence: Arc<Silence>,
    /// There is something new for those who read or poll.
    changed: Notify,
    /// There is something to do for the task that fills.
    wanted: Notify,
}

struct State {
    queue: VecDeque<Message>,
    weight: usize,
    /// Bytes of the first message's frame that were read already.
    sent: usize,
    phase: Phase,
    /// The task sleeps until there is room.
    full: bool,
    /// So much was fetched since there was nothing that there may be more.
    more: bool,
    /// Until when reads wait for that.
    gathers_until: Option<Instant>,
    /// Somebody who does not want to wait asks whether there is something now.
    asked: bool,
    /// Somebody who does not want to wait did so in vain, and nothing was heard from the store since.
    silent: bool,
    /// It was empty when it was opened, and whoever waits for the first message has read nothing yet.
    owed: bool,
    /// The end of the round was read already.
    told: bool,
    /// The mount ends: whoever reads gets end of file.
    ended: bool,
    /// Counts what made it readable.
    news: u64,
}

enum Phase {
    /// The task is looking for messages.
    Filling,
    /// There was nothing at the last look; the task waits for a push.
    Waiting,
    /// The round has ended; the read behind the one that says so begins another.
    End,
    /// The next read fails with this.
    Failed(Error),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, messages: Vec<Message>) {
        let mut state = self.lock();
        let weights = messages.iter().map(|message| weight(&message.data));
        let added = weights.sum::<usize>();
        state.weight += added;
        state.more |= added >= MUCH;
        state.queue.extend(messages);
        state.phase = Phase::Filling;
        state.silent = false;
        state.news += 1;
        drop(state);
        self.changed.notify_waiters();
    }

    /// Waits for what has `changed`, and notes if nothing is heard.
    async fn heard(&self, changed: impl Future<Output = ()>, patience: &Patience) {
        if timeout_at(patience.until, changed).await.is_err() {
            self.lock().silent = true;
            if patience.is_full {
                self.silence.begin();
            }
        }
    }

    /// Has the store asked anew that did not answer in time when nobody waited for it: it may be back since.
    fn forgive(&self) {
        let mut state = self.lock();
        if matches!(&state.phase, Phase::Failed(error) if error.kind() == Kind::TimedOut) {
            state.phase = Phase::Filling;
            state.silent = true;
            self.wanted.notify_one();
        }
    }

    fn enter(&self, phase: Phase) {
        let mut state = self.lock();
        if matches!(phase, Phase::End | Phase::Failed(_)) {
            state.news += 1;
        }
        state.phase = phase;
        state.silent = false;
        state.more = false;
        drop(state);
        self.changed.notify_waiters();
    }
}

impl Reader {
    /// Subscribes, pins the end and starts to fetch; needs the runtime's context.
    ///
    /// # Errors
    /// As for [`Backend::subscribe`].
    pub async fn open(
        backend: &dyn Backend,
        pipe: &PipeName,
        mode: Mode,
        frame: Frame,
        silence: &Arc<Silence>,
    ) -> Result<Self> {
        let subscription = Subscription::open(backend, pipe, mode).await?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queue: VecDeque::new(),
                weight: 0,
                sent: 0,
                phase: Phase::Filling,
                full: false,
                more: false,
                gathers_until: None,
                asked: false,
                silent: false,
                owed: false,
                told: false,
                ended: false,
                news: 0,
            }),
            silence: Arc::clone(silence),
            changed: Notify::new(),
            wanted: Notify::new(),
        });
        let floor = subscription.floor();
        let fill = tokio::spawn(fill(Arc::clone(&shared), subscription)).abort_handle();
        Ok(Reader {
            shared,
            floor,
            fill,
            frame,
        })
    }

    /// At most `size` bytes: whole messages, as many as fit, or a part of one that alone does not fit.
    /// Empty at the end of the round. Waits where the mode does, and a moment for what is being fetched, so that programs
    /// that read a file of its size at once get all of it; with `nonblock` it does not.
    ///
    /// # Errors
    /// As for [`crate::backend::Source::next`]; [`Kind::WouldBlock`] with `nonblock`.
    pub async fn read(&self, size: usize, nonblock: bool) -> Result<Vec<u8>> {
        let mut asked = false;
        self.shared.forgive();
        let patience = nonblock.then(|| self.shared.silence.patience());
        let nothing = || Error::new(Kind::WouldBlock, "there is no message now");
        let size = size.min(LONGEST_ANSWER);
        loop {
            // Made before the look, so that nothing is missed.
            let changed = self.shared.changed.notified();
            let until = 'look: {
                let mut state = self.current();
                if !nonblock && state.gathers(self.frame, size) {
                    let now = Instant::now();
                    let until = *state.gathers_until.get_or_insert(now + GATHERING);
                    if now < until {
                        break 'look Some(until);
                    }
                }
                state.gathers_until = None;
                let bytes = state.take(self.frame, size);
                self.make_room(&mut state);
                if !bytes.is_empty() || state.ended || size == 0 {
                    return Ok(bytes);
                }
                match std::mem::replace(&mut state.phase, Phase::Filling) {
                    Phase::Filling if nonblock && state.silent => return Err(nothing()),
                    Phase::Filling => {}
                    Phase::Waiting if !nonblock => state.phase = Phase::Waiting,
                    Phase::Waiting if asked => {
                        state.phase = Phase::Waiting;
                        return Err(nothing());
                    }
                    Phase::Waiting => {
                        // What was pushed a moment ago may not have arrived here: look again.
                        asked = true;
                        state.asked = true;
                        self.shared.wanted.notify_one();
                    }
                    Phase::End if state.told => {
                        state.told = false;
                        self.shared.wanted.notify_one();
                    }
                    Phase::End => {
                        state.phase = Phase::End;
                        state.told = true;
                        return Ok(bytes);
                    }
                    Phase::Failed(error) => {
                        self.shared.wanted.notify_one();
                        return Err(error);
                    }
                }
                None
            };
            match (until, &patience) {
                (Some(until), _) => drop(timeout_at(until, changed).await),
                (None, None) => changed.await,
                (None, Some(patience)) => self.shared.heard(changed, patience).await,
            }
        }
    }

    /// The state without what a reset has dropped.
    fn current(&self) -> MutexGuard<'_, State> {
        let floor = self.floor.position();
        let mut state = self.shared.lock();
        state.discard(floor);
        if self.frame == Frame::File {
            state.pass_over_empty();
        }
        if state.is_owed_more() {
            state.phase = Phase::Filling;
            self.shared.wanted.notify_one();
        }
        self.make_room(&mut state);
        state
    }

    fn make_room(&self, state: &mut State) {
        if state.full && state.weight <= BUFFER / 2 {
            state.full = false;
            self.shared.wanted.notify_one();
        }
    }

    /// Whether a read would not wait, as far as is known without asking, and how much news there was by then, for
    /// [`Reader::news`].
    pub fn looks_readable(&self) -> (bool, u64) {
        let state = self.current();
        (state.readable(), state.news)
    }

    /// Whether a read would not wait. Looks again in the store before it says no.
    pub async fn is_readable(&self) -> bool {
        let mut asked = false;
        self.shared.forgive();
        let patience = self.shared.silence.patience();
        loop {
            let changed = self.shared.changed.notified();
            {
                let mut state = self.current();
                if state.readable() {
                    return true;
                }
                let is_waiting = matches!(state.phase, Phase::Waiting);
                if is_waiting && asked || state.silent {
                    return false;
                }
                if is_waiting {
                    asked = true;
                    state.asked = true;
                    state.phase = Phase::Filling;
                    self.shared.wanted.notify_one();
                }
            }
            self.shared.heard(changed, &patience).await;
        }
    }

    /// Waits for more news than were `seen`. A poller that is told of changes only (EPOLLET) counts on it
    /// also while there is something left to read.
    pub async fn news(&self, seen: u64) {
        loop {
            let changed = self.shared.changed.notified();
            {
                let state = self.shared.lock();
                if state.news > seen || state.ended {
                    return;
                }
            }
            changed.await;
        }
    }

    /// Ends the file for whoever reads, now and later.
    pub fn end(&self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_waiters();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.fill.abort();
    }
}

impl State {
    fn readable(&self) -> bool {
        !self.queue.is_empty() || self.ended || matches!(self.phase, Phase::End | Phase::Failed(_))
    }

    /// Whether there is more on its way for a read of `size` bytes that could have something now.
    fn gathers(&self, frame: Frame, size: usize) -> bool {
        let count = self.queue.len();
        let bytes = self.weight - count * weight(&[]);
        let ready = framed_total(frame, count as u64, bytes as u64) - self.sent as u64;
        self.more
            && matches!(self.phase, Phase::Filling)
            && !(self.full || self.weight >= BUFFER || self.ended)
            && frame != Frame::File
            && count > 0
            && ready < size as u64
    }

    /// Whether a reset has dropped all that came for one who waits for a first message: then it is no end for him.
    fn is_owed_more(&self) -> bool {
        self.owed && self.queue.is_empty() && matches!(self.phase, Phase::End)
    }

    /// Drops what stands before `floor`. A message that was read in part already is finished.
    fn discard(&mut self, floor: Position) {
        let begun = usize::from(self.sent > 0);
        while let Some(message) = self.queue.get(begun)
            && message.position < floor
        {
            self.weight -= weight(&message.data);
            self.queue.remove(begun);
        }
    }

    /// Drops empty messages, which would read as end of file, so that none is taken for something to read.
    fn pass_over_empty(&mut self) {
        while let Some(first) = self.queue.front()
            && first.data.is_empty()
        {
            self.owed = false;
            self.weight -= weight(&first.data);
            self.queue.pop_front();
        }
    }

    fn take(&mut self, frame: Frame, size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        while let Some(first) = self.queue.front() {
            let left = framed_len(frame, first.data.len()) - self.sent;
            let room = size - out.len();
            self.owed = false;
            if left > room && !out.is_empty() {
                break;
            }
            if out.is_empty() {
                out.reserve(size.min(self.weight.max(left)));
            }
            encode(frame, &first.data, self.sent, room, &mut out);
            if left > room {
                self.sent += room;
                break;
            }
            self.sent = 0;
            self.weight -= weight(&first.data);
            self.queue.pop_front();
            if frame == Frame::File {
                break;
            }
        }
        out
    }
}

/// Keeps the buffer filled until it is aborted.
async fn fill(shared: Arc<Shared>, mut subscription: Subscription) {
    loop {
        let (full, asked) = {
            let mut state = shared.lock();
            state.full = state.weight >= BUFFER;
            (state.full, std::mem::take(&mut state.asked))
        };
        if full {
            shared.wanted.notified().await;
            continue;
        }
        let step = if asked || subscription.has_end() {
            let step = subscription.ready(FETCH).await;
            if !matches!(&step, Err(error) if error.kind() == Kind::TimedOut) {
                shared.silence.end();
            }
            step
        } else {
            Ok(Step::Wait)
        };
        let step = match step {
            // Who only asked goes on waiting, as one who does not ask.
            Err(error) if asked && error.kind() == Kind::TimedOut && !subscription.may_end() => {
                Ok(Step::Wait)
            }
            step => step,
        };
        match step {
            Ok(Step::Messages(messages)) => shared.add(messages),
            Ok(Step::Wait) => {
                shared.lock().owed |= subscription.has_end();
                shared.enter(Phase::Waiting);
                tokio::select! {
                    biased;
                    step = subscription.wait(FETCH) => match step {
                        Ok(Step::Messages(messages)) => {
                            shared.silence.end();
                            shared.add(messages);
                        }
                        Ok(Step::End | Step::Wait) => {}
                        Err(error) => fail(&shared, error).await,
                    },
                    () = shared.wanted.notified() => {}
                }
            }
            Ok(Step::End) => {
                shared.enter(Phase::End);
                while matches!(shared.lock().phase, Phase::End) {
                    shared.wanted.notified().await;
                }
                loop {
                    let is_owed = shared.lock().owed;
                    match subscription.restart(is_owed).await {
                        Ok(()) => break,
                        Err(error) => fail(&shared, error).await,
                    }
                }
            }
            Err(error) => fail(&shared, error).await,
        }
        // Whoever was waiting for these messages goes first.
        tokio::task::yield_now().await;
    }
}

/// Leaves the failure for the next read, and goes on after that.
async fn fail(shared: &Shared, error: Error) {
    shared.enter(Phase::Failed(error));
    while matches!(shared.lock().phase, Phase::Failed(_)) {
        shared.wanted.notified().await;
    }
}
