BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0003');
CREATE TABLE attempt (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	step VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	fence VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	started_at INTEGER NOT NULL, 
	ended_at INTEGER, 
	error VARCHAR, 
	PRIMARY KEY (id), 
	CONSTRAINT state_known CHECK (state IN ('submitted', 'published', 'failed', 'interrupted', 'lost')), 
	FOREIGN KEY(run_id) REFERENCES run (id)
);
INSERT INTO "attempt" VALUES(1,1,'train',1,'f1','published',1764000100000,1764000200000,NULL);
INSERT INTO "attempt" VALUES(2,2,'train',1,'f2','failed',1764001100000,1764001200000,'out of memory');
INSERT INTO "attempt" VALUES(3,3,'train',1,'f3','interrupted',1764002100000,1764002200000,NULL);
INSERT INTO "attempt" VALUES(4,3,'train',2,'f4','submitted',1764002300000,NULL,NULL);
CREATE TABLE "drop" (
	id INTEGER NOT NULL, 
	track VARCHAR NOT NULL, 
	role VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	name_bytes BLOB NOT NULL, 
	name VARCHAR NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	size_bytes INTEGER NOT NULL, 
	rows INTEGER NOT NULL, 
	findings INTEGER NOT NULL, 
	warnings INTEGER NOT NULL, 
	duplicate_of INTEGER, 
	reason VARCHAR, 
	received_at INTEGER NOT NULL, 
	first_run INTEGER, quarantined INTEGER DEFAULT '0' NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT state_known CHECK (state IN ('accepted', 'rejected', 'duplicate', 'withdrawn', 'held')), 
	CONSTRAINT role_known CHECK (role IN ('train', 'heldout')), 
	FOREIGN KEY(duplicate_of) REFERENCES "drop" (id), 
	FOREIGN KEY(first_run) REFERENCES run (id)
);
INSERT INTO "drop" VALUES(1,'default','train','accepted',X'66697273742E6A736F6E6C','first.jsonl','a1',100,10,0,0,NULL,NULL,1764000000000,1,2);
INSERT INTO "drop" VALUES(2,'default','heldout','accepted',X'FF2E6A736F6E6C','\xff.jsonl','a2',100,10,0,2,NULL,NULL,1764000000001,1,0);
INSERT INTO "drop" VALUES(3,'default','train','duplicate',X'616761696E','again','a1',100,10,0,0,1,NULL,1764000000002,NULL,0);
INSERT INTO "drop" VALUES(4,'default','train','rejected',X'62','b','',100,10,3,0,NULL,'3 bad rows',1764000000003,NULL,0);
INSERT INTO "drop" VALUES(5,'default','train','held',X'63','c','a5',100,10,0,0,NULL,'new in run 2',1764000000004,2,0);
INSERT INTO "drop" VALUES(6,'nächtlich','train','withdrawn',X'64','d','a1',100,10,0,0,NULL,'wrong',1764000000005,6,0);
CREATE TABLE event (
	id INTEGER NOT NULL, 
	at INTEGER NOT NULL, 
	kind VARCHAR NOT NULL, 
	track VARCHAR, 
	run_id INTEGER, 
	drop_id INTEGER, 
	detail JSON, 
	PRIMARY KEY (id)
);
INSERT INTO "event" VALUES(1,1764000000000,'drop_accepted','default',1,1,'{"name": "first.jsonl", "rows": 10}');
INSERT INTO "event" VALUES(2,1764000900000,'promoted','default',1,NULL,'{}');
CREATE TABLE "promotion" (
	id INTEGER NOT NULL, 
	track VARCHAR NOT NULL, 
	run_id INTEGER, 
	kind VARCHAR DEFAULT 'promotion' NOT NULL, 
	state VARCHAR NOT NULL, 
	generation INTEGER NOT NULL, 
	model_id VARCHAR NOT NULL, 
	model_path VARCHAR NOT NULL, 
	previous_model_id VARCHAR, 
	previous_path VARCHAR, 
	reason VARCHAR NOT NULL, 
	created_at INTEGER NOT NULL, 
	done_at INTEGER, 
	approved_by VARCHAR, 
	overrode VARCHAR, 
	drops JSON, 
	hook_state VARCHAR, 
	hook_error VARCHAR, 
	hook_output VARCHAR, 
	health_state VARCHAR, 
	health_error VARCHAR, 
	health_output VARCHAR, 
	PRIMARY KEY (id), 
	CONSTRAINT state_known CHECK (state IN ('intent', 'done', 'abandoned')), 
	CONSTRAINT kind_known CHECK (kind IN ('base', 'promotion', 'forced', 'rollback')), 
	CONSTRAINT hook_state_known CHECK (hook_state IN ('pending', 'running', 'ok', 'failed', 'skipped')), 
	CONSTRAINT health_state_known CHECK (health_state IN ('pending', 'running', 'ok', 'failed', 'skipped')), 
	FOREIGN KEY(run_id) REFERENCES run (id)
);
INSERT INTO "promotion" VALUES(1,'default',NULL,'base','done',0,'ba','/models/base',NULL,NULL,'base model',1764000000000,1764000000000,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "promotion" VALUES(2,'default',1,'promotion','done',1,'c0','models/c0','ba','/models/base','better by 4.0 points',1764000900000,1764000900000,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "promotion" VALUES(3,'default',2,'promotion','abandoned',2,'c1','models/c1','c0','models/c0','came too late',1764001900000,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "promotion" VALUES(4,'default',NULL,'rollback','done',2,'ba','/models/base','c0','models/c0','rolled back to generation 0: it swears',1764200400000,1764200400100,'ada',NULL,'[1, 2]','ok',NULL,'reloaded','failed','it swears',NULL);
CREATE TABLE "run" (
	id INTEGER NOT NULL, 
	track VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	"trigger" VARCHAR NOT NULL, 
	created_at INTEGER NOT NULL, 
	not_before INTEGER NOT NULL, 
	token VARCHAR, 
	heartbeat_at INTEGER, 
	started_at INTEGER, 
	ended_at INTEGER, 
	config JSON, 
	snapshot JSON, 
	failures INTEGER NOT NULL, 
	deaths INTEGER NOT NULL, 
	cancel_requested BOOLEAN NOT NULL, 
	step VARCHAR, 
	error VARCHAR, 
	hint VARCHAR, 
	outcome VARCHAR, 
	sentence VARCHAR, heldout_version VARCHAR, 
	PRIMARY KEY (id), 
	CONSTRAINT state_known CHECK (state IN ('queued', 'running', 'waiting', 'succeeded', 'failed', 'cancelled', 'quarantined')), 
	CONSTRAINT running_has_token CHECK ((state = 'running') = (token IS NOT NULL)), 
	CONSTRAINT final_has_end CHECK ((state IN ('succeeded', 'failed', 'cancelled', 'quarantined')) = (ended_at IS NOT NULL))
);
INSERT INTO "run" VALUES(1,'default','succeeded','drop',1764000000000,1764000060000,NULL,1764000900000,1764000060001,1764000900001,'{"track": "default"}','[{"id": 1}]',0,0,0,'decide',NULL,NULL,'promoted','better by 4.0 points','v1');
INSERT INTO "run" VALUES(2,'default','failed','drop',1764001000000,1764001060000,NULL,1764001900000,1764001060001,1764001900001,'{}','[]',3,0,0,'train','out of memory','lower train.batch_size',NULL,NULL,NULL);
INSERT INTO "run" VALUES(3,'default','running','nightly',1764002000000,1764002060000,'token-of-run-3',1764002900000,1764002060001,NULL,'{}','[]',1,1,1,'train',NULL,NULL,NULL,NULL,NULL);
INSERT INTO "run" VALUES(4,'default','queued','drop',1764003000000,1764003060000,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "run" VALUES(5,'nächtlich','cancelled','drop',1764003000000,1764003060000,NULL,NULL,NULL,1764003900000,NULL,NULL,0,0,0,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "run" VALUES(6,'nächtlich','waiting','drop',1764003000000,1764003060000,NULL,NULL,1764003070000,NULL,'{}','[]',1,2,0,'merge','killed',NULL,NULL,NULL,NULL);
INSERT INTO "run" VALUES(9,'default','quarantined','drop',1764200000000,1764200000000,NULL,NULL,NULL,1764200300000,'{"track": "default"}','[{"id": 1}]',0,3,0,'train','killed','free memory',NULL,NULL,NULL);
CREATE TABLE slot (
	id INTEGER NOT NULL, 
	track VARCHAR NOT NULL, 
	due_at INTEGER NOT NULL, 
	taken_at INTEGER NOT NULL, 
	outcome VARCHAR NOT NULL, 
	run_id INTEGER, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run_id) REFERENCES run (id)
);
INSERT INTO "slot" VALUES(1,'nächtlich',1764003600000,1764003600100,'queued',6);
INSERT INTO "slot" VALUES(2,'nächtlich',1764090000000,1764090000100,'no_new_data',NULL);
CREATE TABLE track (
	name VARCHAR NOT NULL, 
	salt VARCHAR NOT NULL, 
	created_at INTEGER NOT NULL, 
	split JSON, 
	metric VARCHAR, 
	max_new_tokens INTEGER, 
	eval_batch_size INTEGER, 
	base_path VARCHAR, 
	base_model_id VARCHAR, 
	champion_generation INTEGER, 
	champion_model_id VARCHAR, 
	champion_path VARCHAR, nightly JSON, noise JSON, 
	PRIMARY KEY (name)
);
INSERT INTO "track" VALUES('default','5a17',1764000000000,'{"heldout": 0.15, "dev": 0.03, "scored_records": 1000}','exact_match',16,16,'/models/base','ba',2,'ba','/models/base',NULL,'{"records": 32, "changed": 1, "points": 0.5}');
INSERT INTO "track" VALUES('nächtlich','5a18',1764000000001,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,'{"schedule":null,"since":1764090000000,"looked_at":1764090000100}',NULL);
CREATE INDEX ix_event_at ON event (at);
CREATE INDEX ix_event_drop_id ON event (drop_id);
CREATE INDEX ix_event_run_id ON event (run_id);
CREATE INDEX ix_attempt_run_id ON attempt (run_id);
CREATE UNIQUE INDEX one_attempt_number ON attempt (run_id, step, number);
CREATE UNIQUE INDEX one_open_attempt ON attempt (run_id) WHERE state = 'submitted';
CREATE INDEX ix_drop_sha256 ON "drop" (sha256);
CREATE UNIQUE INDEX one_accepted_drop ON "drop" (track, role, sha256) WHERE state = 'accepted';
CREATE UNIQUE INDEX one_slot_a_night ON slot (track, due_at);
CREATE INDEX ix_run_track ON run (track);
CREATE UNIQUE INDEX one_open_run ON run (track) WHERE state = 'queued';
CREATE INDEX ix_run_state ON run (state);
CREATE INDEX drop_states ON "drop" (track, state);
CREATE INDEX drop_names ON "drop" (track, role, name_bytes);
CREATE INDEX drop_waiting ON "drop" (track, role, state) WHERE first_run IS NULL;
CREATE INDEX ix_drop_duplicate_of ON "drop" (duplicate_of);
CREATE INDEX ix_drop_first_run ON "drop" (first_run);
CREATE INDEX ix_promotion_track ON promotion (track);
CREATE UNIQUE INDEX one_promotion_a_run ON promotion (run_id) WHERE state = 'done' AND kind = 'promotion' AND run_id IS NOT NULL;
CREATE UNIQUE INDEX one_done_generation ON promotion (track, generation) WHERE state = 'done';
CREATE INDEX run_awaiting ON run (outcome) WHERE outcome = 'awaiting_approval';
COMMIT;
