//! Inodes: one for each pipe, and one for each selector in use. The kernel counts its look-ups; an inode
//! that it has forgotten is dropped.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::selector::Selector;

/// The root directory's inode number (FUSE_ROOT_ID).
pub(super) const ROOT: u64 = 1;

#[derive(Default)]
pub(super) struct Tree {
    inodes: Mutex<Inodes>,
}

#[derive(Default)]
struct Inodes {
    by_number: HashMap<u64, Inode>,
    by_selector: HashMap<Selector, u64>,
    last: u64,
}

struct Inode {
    selector: Selector,
    lookups: u64,
}

impl Inodes {
    fn number(&mut self, selector: &Selector) -> u64 {
        if let Some(number) = self.by_selector.get(selector) {
            return *number;
        }
        self.last = self.last.max(ROOT) + 1;
        self.by_selector.insert(selector.clone(), self.last);
        let inode = Inode {
            selector: selector.clone(),
            lookups: 0,
        };
        self.by_number.insert(self.last, inode);
        self.last
    }
}

impl Tree {
    fn lock(&self) -> MutexGuard<'_, Inodes> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The selector's inode number, counting one look-up by the kernel.
    pub(super) fn look_up(&self, selector: &Selector) -> u64 {
        let mut inodes = self.lock();
        let number = inodes.number(selector);
        if let Some(inode) = inodes.by_number.get_mut(&number) {
            inode.lookups += 1;
        }
        number
    }

    /// An inode number that is no pipe's.
    pub(super) fn stranger(&self) -> u64 {
        let mut inodes = self.lock();
        inodes.last = inodes.last.max(ROOT) + 1;
        inodes.last
    }

    pub(super) fn selector(&self, number: u64) -> Option<Selector> {
        let inodes = self.lock();
        inodes
            .by_number
            .get(&number)
            .map(|inode| inode.selector.clone())
    }

    /// The kernel has forgotten `count` of its look-ups.
    pub(super) fn forget(&self, number: u64, count: u64) {
        let mut inodes = self.lock();
        if let Some(inode) = inodes.by_number.get_mut(&number) {
            inode.lookups = inode.lookups.saturating_sub(count);
            if inode.lookups == 0
                && let Some(inode) = inodes.by_number.remove(&number)
            {
                inodes.by_selector.remove(&inode.selector);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(text: &str) -> Selector {
        text.parse().expect(text)
    }

    #[test]
    fn an_inode_lives_as_long_as_the_kernel_remembers_it() {
        let tree = Tree::default();
        let number = tree.look_up(&selector("a"));
        assert_eq!(tree.look_up(&selector("a")), number);
        tree.forget(number, 1);
        assert_eq!(tree.selector(number), Some(selector("a")));
        tree.forget(number, 1);
        assert_eq!(tree.selector(number), None);
        assert_ne!(
            tree.look_up(&selector("a")),
            number,
            "numbers are not used twice"
        );
    }

    #[test]
    fn each_selector_has_an_inode_of_its_own() {
        let tree = Tree::default();
        let plain = tree.look_up(&selector("a"));
        let follow = tree.look_up(&selector("a@follow"));
        assert!(plain > ROOT && follow > ROOT && plain != follow);
        assert!(![plain, follow, ROOT].contains(&tree.stranger()));
    }
}
