//! Several writers, readers and mounts of one store at once.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::support::{DNPIPES, Mount, PYTHON, Running, Store, wait_for};

/// Numbers that look random, the same every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

/// A writer's lines: from 1 byte to `longest`, short ones more often. Each begins with the writer's letter,
/// and the rest, no two alike, says whose it is, the how manieth, and whether it is whole.
fn stream(letter: u8, lines: usize, longest: usize) -> Vec<u8> {
    let mut dice = Dice(u64::from(letter));
    let mut out = Vec::new();
    for line in 0..lines {
        let length = match line {
            0 => 1,
            1 => longest,
            _ => 1 + dice.roll() as usize % (longest >> (dice.roll() % 12)),
        };
        let mut text = format!("{} {line} {length} ", char::from(letter)).into_bytes();
        while text.len() < length {
            text.extend(format!("{:08x}", dice.roll()).bytes());
        }
        text.truncate(length);
        out.extend(text);
        out.push(b'\n');
    }
    out
}

/// The lines of `bytes` that each letter's writer has written, in order, as one stream.
fn by_writer(bytes: &[u8]) -> BTreeMap<u8, Vec<u8>> {
    let mut streams = BTreeMap::<u8, Vec<u8>>::new();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        streams.entry(line[0]).or_default().extend(line);
    }
    streams
}

fn assert_whole(bytes: &[u8], written: &BTreeMap<u8, Vec<u8>>) {
    let read = by_writer(bytes);
    assert!(
        read.keys().eq(written.keys()),
        "lines that nobody has written begin with one of {:?}",
        read.keys().map(|key| char::from(*key)).collect::<String>()
    );
    for (letter, stream) in written {
        let differs = stream.iter().zip(&read[letter]).position(|(a, b)| a != b);
        assert!(
            stream == &read[letter],
            "writer {}: {} bytes written, {} read, the first difference at {differs:?}",
            char::from(*letter),
            stream.len(),
            read[letter].len()
        );
    }
}

/// What a snapshot of each mount hashes to; they must agree.
fn one_hash(mounts: &[&Mount], pipe: &str) -> String {
    let hash = |mount: &&Mount| mount.out(&format!("sha256sum < {pipe}@snapshot"));
    let hashes: Vec<String> = mounts.iter().map(hash).collect();
    assert!(
        hashes.iter().all(|hash| *hash == hashes[0]),
        "the mounts read different orders: {hashes:?}"
    );
    hashes[0].clone()
}

/// Writes each line by one write(2).
const BY_LINE: &str = "
import os, sys
fd = os.open('topic', os.O_WRONLY)
for line in open(sys.argv[1], 'rb'):
    if os.write(fd, line) != len(line):
        sys.exit('a short write')
";

/// How a file's lines may be written to `topic`, in the mount.
fn writers(file: &Path) -> Vec<String> {
    let file = file.display();
    vec![
        format!("{PYTHON} -c \"{BY_LINE}\" {file}"),
        format!("cat {file} > topic"),
        format!("dd if={file} of=topic bs=7777 conv=notrunc status=none"),
        format!("while IFS= read -r line; do printf '%s\\n' \"$line\"; done < {file} > topic"),
        format!("while IFS= read -r line; do echo \"$line\" >> topic; done < {file}"),
        format!("tee -a topic < {file} > /dev/null"),
        format!("dd if={file} of=topic bs=1M conv=notrunc status=none"),
        format!("exec 3<> topic; cat {file} >&3"),
    ]
}

/// Runs them all to their successful end.
fn succeed(running: Vec<Running>) {
    for running in running {
        let output = running.finish();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && errors.is_empty(), "{errors}");
    }
}

const LONGEST: usize = 300_000;

/// "one message is atomic: never interleaved with another writer's, of any size up to the limit", "order is
/// the order of acknowledgement", for all mounts of a store.
#[test]
fn eight_writers_on_two_mounts_mix_nothing() {
    let store = Store::new();
    let (one, two) = (Mount::new(&store.url(), &[]), Mount::new(&store.url(), &[]));
    one.out("touch topic");
    let mut written = BTreeMap::new();
    let mut running = Vec::new();
    for (number, letter) in (b'a'..=b'h').enumerate() {
        let file = store.folder().join(char::from(letter).to_string());
        let stream = stream(letter, 60, LONGEST);
        fs::write(&file, &stream).expect("a writer's lines");
        written.insert(letter, stream);
        let mount = [&one, &two][number % 2];
        running.push(mount.spawn(&writers(&file)[number]));
    }
    succeed(running);
    one_hash(&[&one, &two], "topic");
    assert_whole(
        &fs::read(two.file("topic@snapshot")).expect("a snapshot"),
        &written,
    );
}

/// The same where `dnpipes push` writes beside the mounts.
#[test]
fn mounts_and_push_commands_mix_nothing() {
    let store = Store::new();
    let url = store.fast_url();
    let (one, two) = (Mount::new(&url, &[]), Mount::new(&url, &[]));
    one.out("touch topic");
    let mut written = BTreeMap::new();
    let mut running = Vec::new();
    for (number, letter) in (b'a'..=b'h').enumerate() {
        let file = store.folder().join(char::from(letter).to_string());
        // execve(2) takes no longer argument.
        let each_an_argument = number == 7;
        let (lines, longest) = if each_an_argument {
            (25, 100_000)
        } else {
            (60, LONGEST)
        };
        let stream = stream(letter, lines, longest);
        fs::write(&file, &stream).expect("a writer's lines");
        written.insert(letter, stream);
        let push = format!("{DNPIPES} push --source {url} topic");
        let script = match number {
            0..4 => writers(&file)[number].clone(),
            7 => format!(
                "while IFS= read -r line; do {push} -- \"$line\"; done < {}",
                file.display()
            ),
            _ => format!("{push} < {}", file.display()),
        };
        running.push([&one, &two][number % 2].spawn(&script));
    }
    succeed(running);
    one_hash(&[&one, &two], "topic");
    let pulled = store.run(&["pull", "topic@snapshot"]);
    assert_whole(&pulled.stdout, &written);
}

/// Pushes numbered lines until a file is there, then some more, and prints the last number.
const UNTIL_STOPPED: &str = "
import os, sys
name, stop, out = sys.argv[1], sys.argv[2], sys.argv[3]
fd = os.open(out, os.O_WRONLY) if out != '-' else 1
number = more = 0
while more < 20:
    more += os.path.exists(stop)
    number += 1
    os.write(fd, ('%s %d\\n' % (name, number)).encode())
print(number, file=sys.stderr)
";

/// The numbers of each writer, in the order of the lines.
fn numbers<'a>(lines: impl Iterator<Item = &'a str>) -> BTreeMap<String, Vec<u64>> {
    let mut numbers = BTreeMap::<String, Vec<u64>>::new();
    for line in lines {
        let (name, number) = line.split_once(' ').expect("a name and a number");
        let number = number.parse().expect("a number");
        numbers.entry(name.to_owned()).or_default().push(number);
    }
    numbers
}

/// "reset; returns when it has completed": what is read after resets amid pushes is, of each writer, all that
/// came after some point, without a gap; "every reader continues with the first message pushed after it".
#[test]
fn resets_amid_pushes_leave_no_gap() {
    let store = Store::new();
    let url = store.fast_url();
    let (one, two) = (Mount::new(&url, &[]), Mount::new(&url, &[]));
    one.out("touch topic");
    let stop = store.folder().join("stop");
    let followed = store.folder().join("followed");
    let follower = two.spawn(&format!("exec cat topic@follow > {}", followed.display()));
    let mut pushers = Vec::new();
    for number in 0..5 {
        let stop = stop.display();
        let script = format!("exec {PYTHON} -c \"{UNTIL_STOPPED}\" w{number} {stop}");
        let mount = [&one, &two][number % 2];
        pushers.push(mount.spawn(&if number < 4 {
            format!("{script} topic")
        } else {
            format!("({script} -) | {DNPIPES} push --source {url} topic")
        }));
    }
    for round in 0..30 {
        wait_for("messages to drop", || {
            (one.lines("topic").len() > 50).then_some(())
        });
        match round % 3 {
            0 => drop(one.out("truncate -s 0 topic")),
            1 => drop(two.out(&format!(
                "{PYTHON} -c \"import os; os.truncate('topic', 0)\""
            ))),
            _ => assert!(store.run(&["reset", "topic"]).status.success()),
        }
    }
    fs::write(&stop, "").expect("a file");
    let mut last = BTreeMap::new();
    for (number, pusher) in pushers.into_iter().enumerate() {
        let output = pusher.finish();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stderr).expect("text");
        let number_of_lines: u64 = text.trim().parse().expect("a number");
        last.insert(format!("w{number}"), number_of_lines);
    }
    one_hash(&[&one, &two], "topic");
    let lines = one.lines("topic");
    let left = numbers(lines.iter().map(String::as_str));
    assert!(left.keys().eq(last.keys()), "{:?}", left.keys());
    let mut dropped = 0;
    for (name, numbers) in &left {
        assert!(
            numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
            "{name} has a gap: {numbers:?}"
        );
        assert_eq!(numbers.last(), last.get(name), "{name}");
        assert!(numbers.len() >= 20, "{name}: {numbers:?}");
        dropped += numbers[0] - 1;
    }
    assert!(dropped > 0, "no reset has dropped anything");
    // The follower has seen them too, each once and in order, though not those that a reset took first.
    let text = wait_for("the follower", || {
        let text = fs::read_to_string(&followed).ok()?;
        text.ends_with('\n').then_some(())?;
        let seen = numbers(text.lines());
        last.iter()
            .all(|(name, last)| seen.get(name).and_then(|seen| seen.last()) == Some(last))
            .then_some(text)
    });
    drop(follower);
    for (name, numbers) in numbers(text.lines()) {
        assert!(numbers.is_sorted_by(|a, b| a < b), "{name}: {numbers:?}");
        assert!(
            numbers.ends_with(&left[&name]),
            "{name}: the follower missed some of {:?}",
            left[&name]
        );
    }
}

/// "Each open for reading is a subscriber of its own", "Reading removes nothing": every follower gets
/// everything, once, in the same order.
#[test]
fn sixteen_followers_get_everything_in_one_order() {
    const WRITERS: usize = 4;
    const LINES: usize = 400;
    let store = Store::new();
    let url = store.fast_url();
    let (one, two) = (Mount::new(&url, &[]), Mount::new(&url, &[]));
    one.out("touch topic");
    let count = WRITERS * LINES;
    let mut followers: Vec<Running> = (0..16)
        .map(|number| {
            let mount = [&one, &two][number % 2];
            mount.spawn(&format!("head -n {count} topic@follow | sha256sum"))
        })
        .collect();
    for follower in &mut followers {
        follower.wait_until_blocked();
    }
    let mut written = BTreeMap::new();
    let mut running = Vec::new();
    for (number, letter) in (b'a'..).take(WRITERS).enumerate() {
        let file = store.folder().join(char::from(letter).to_string());
        let stream = stream(letter, LINES, 5_000);
        fs::write(&file, &stream).expect("a writer's lines");
        written.insert(letter, stream);
        running.push([&one, &two][number % 2].spawn(&writers(&file)[number]));
    }
    succeed(running);
    let hash = one_hash(&[&one, &two], "topic");
    for follower in followers {
        let output = follower.finish();
        assert_eq!(String::from_utf8_lossy(&output.stdout), hash);
    }
    assert_whole(
        &fs::read(one.file("topic@snapshot")).expect("a snapshot"),
        &written,
    );
}

/// Who comes while another process is making the store finds it empty or whole, and never takes it for
/// another program's: every push that several first users make at once succeeds.
#[test]
fn a_store_can_be_made_by_several_at_once() {
    for round in 0..30 {
        let store = Store::new();
        let pushes: Vec<Running> = (0..6)
            .map(|pusher| store.spawn(&format!("dnpipes push T {pusher}")))
            .collect();
        for push in pushes {
            let output = push.finish();
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "round {round}: {errors}");
        }
        let mut pulled: Vec<String> = store
            .out("dnpipes pull T@snapshot")
            .lines()
            .map(str::to_owned)
            .collect();
        pulled.sort();
        assert_eq!(pulled, ["0", "1", "2", "3", "4", "5"], "round {round}");
    }
}

/// A store that is reached by a symbolic link is the same store: a reset is seen at once.
#[test]
fn a_store_behind_a_link_is_shared_like_any() {
    let store = Store::new();
    for (round, target) in [store.database().as_path(), Path::new("pipes.db")]
        .into_iter()
        .enumerate()
    {
        let link = store.folder().join(format!("link{round}"));
        // Also one to a store that is not there yet.
        symlink(target, &link).expect("a link");
        let mount = Mount::new(&format!("sqlite:{}", link.display()), &[]);
        store.out("dnpipes push T one two");
        let mut reader = fs::File::open(mount.file("T@follow")).expect("opened");
        let mut line = [0; 4];
        reader.read_exact(&mut line).expect("a line");
        assert_eq!(&line, b"one\n");
        store.out("dnpipes reset T; dnpipes push T new");
        reader.read_exact(&mut line).expect("a line");
        assert_eq!(&line, b"new\n");
        store.out("dnpipes reset T");
        let bells = fs::read_dir(store.folder()).expect("a folder").flatten();
        let is_bell = |name: &fs::DirEntry| name.file_name().to_string_lossy().ends_with("-bell");
        assert_eq!(bells.filter(is_bell).count(), 1);
    }
}

/// Who may write to the database may push, whoever was first: the files beside it have its group and mode.
#[test]
fn a_store_is_shared_with_those_who_may_write_to_it() {
    let store = Store::new();
    fs::copy(DNPIPES, store.folder().join("program")).expect("a copy of dnpipes");
    store.out("touch pipes.db; chown 5001:4000 . pipes.db; chmod 660 pipes.db; chmod 2775 .; chmod 755 program");
    let push = |user: u32, group: u32, message: &str| {
        store.sh(&format!(
            "setpriv --reuid={user} --regid={group} --clear-groups ./program push T {message}"
        ))
    };
    for (user, message) in [(5002, "one"), (5001, "two"), (5003, "three")] {
        let pushed = push(user, 4000, message);
        assert!(pushed.status.success(), "{pushed:?}");
    }
    let mount = Mount::new(&store.url(), &[]);
    let pushed = push(5002, 4000, "four");
    assert!(pushed.status.success(), "{pushed:?}");
    assert!(!push(5004, 5004, "five").status.success());
    assert_eq!(mount.lines("T"), ["one", "two", "three", "four"]);
}

/// Nothing of root's comes into being by what others put beside a database in their folder.
#[test]
fn a_file_beside_a_database_that_others_have_put_there_stays_as_it_is() {
    let store = Store::new();
    store.out("dnpipes push T one; rm pipes.db-bell; printf x > bait; chown 5001:5001 bait; chmod 700 bait; cp -p bait pipes.db-bell");
    // Its owner could end whoever has it in memory.
    let refused = store.sh("dnpipes push T two");
    let why = String::from_utf8_lossy(&refused.stderr);
    assert!(why.contains("-bell belongs to a stranger"), "{why}");
    assert_eq!(
        store.out("stat -c '%a %u %g' pipes.db-bell"),
        "700 5001 5001\n"
    );
    store.out("rm pipes.db-bell; ln -s bait pipes.db-bell");
    assert!(!store.sh("dnpipes push T three").status.success());
    assert_eq!(
        store.out("cat bait; stat -c ' %a %u %g' bait"),
        "x 700 5001 5001\n"
    );
}
