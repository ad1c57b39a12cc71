-- The common case of ledger.capture or ledger.void with its usage row (tenancy/accounts/one_trip.py), in one statement;
-- the row says what the engine measured, or null.
-- False: it is not the common case, and nothing has changed. Times in ns, amounts in nano-USD.
CREATE OR REPLACE FUNCTION settle_hold_v2(
    p_tenant text, p_project text, p_key text, p_request text, p_hold text, p_state text, p_captured bigint,
    p_tokens bigint, p_now bigint, p_day bigint, p_month bigint,
    p_model text, p_price text, p_tier text, p_prompt bigint, p_cached bigint, p_completion bigint,
    p_started bigint, p_reason text, p_stream boolean,
    p_engine bigint, p_blocks bigint, p_prefill bigint, p_recomputed bigint, p_decode bigint
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    held bigint;
    revenue numeric := 0;
    num_accounts int := 0;
    one record;
    scopes text[] := ARRAY[p_tenant, p_project, p_key];
BEGIN
    PERFORM set_config('bulkhead.tenant', p_tenant, true);
    -- The hold first, then the accounts: ledger.py says why.
    SELECT h.amount_nano_usd INTO held FROM hold h
        WHERE h.id = p_hold AND h.tenant_id = p_tenant AND h.state = 'pending' AND h.amount_nano_usd >= p_captured
        FOR UPDATE;
    IF NOT FOUND THEN RETURN false; END IF;
    FOR one IN SELECT a.kind, a.balance_nano_usd AS nano FROM account a WHERE a.tenant_id = p_tenant AND a.currency = 'USD'
               ORDER BY a.id FOR UPDATE LOOP
        num_accounts := num_accounts + 1;
        IF one.kind = 'revenue' THEN revenue := one.nano; END IF;
    END LOOP;
    IF num_accounts <> 4 OR revenue + p_captured > 9223372036854775807 THEN RETURN false; END IF;
    PERFORM 1 FROM usage_record r WHERE r.request_id = p_request;
    IF FOUND THEN RETURN false; END IF;
    -- No credit is due to expire, the first one covers the charge, and no budget has anything to tell.
    PERFORM 1 FROM credit c WHERE c.tenant_id = p_tenant AND c.left_nano_usd > 0 AND c.expires_ns <= p_now;
    IF FOUND THEN RETURN false; END IF;
    SELECT c.id, c.left_nano_usd AS nano INTO one FROM credit c
        WHERE c.tenant_id = p_tenant AND c.left_nano_usd > 0
        ORDER BY c.kind = 'paid', c.expires_ns NULLS LAST, c.created_ns, c.id COLLATE "C" LIMIT 1;
    IF p_captured > 0 AND (NOT FOUND OR one.nano < p_captured) THEN RETURN false; END IF;
    PERFORM 1 FROM budget b
        JOIN budget_use u ON u.budget_id = b.id
            AND u.period_start_ns = CASE b.period WHEN 'day' THEN p_day WHEN 'month' THEN p_month ELSE 0 END
        CROSS JOIN unnest(ARRAY[50, 80, 95, 100]) threshold
        WHERE b.scope_id = ANY (scopes) AND threshold > u.alerted_percent
          AND u.used_nano_usd::numeric + p_captured > 0
          AND (u.used_nano_usd::numeric + p_captured) * 100 >= b.limit_nano_usd::numeric * threshold;
    IF FOUND THEN RETURN false; END IF;

    UPDATE hold SET state = p_state, captured_nano_usd = p_captured, settled_ns = p_now, num_tokens = p_tokens
        WHERE id = p_hold;
    INSERT INTO ledger_transaction (id, tenant_id, kind, hold_id, memo, created_ns)
        VALUES (p_hold || ':settle', p_tenant, p_state, p_hold, '', p_now);
    INSERT INTO ledger_entry (transaction_id, line, account_id, amount_nano_usd)
        SELECT p_hold || ':settle', row_number() OVER (ORDER BY v.place) - 1, p_tenant || ':' || v.kind || ':USD', v.nano
        FROM (VALUES (0, 'held', -held), (1, 'revenue', p_captured), (2, 'credit', held - p_captured)) v (place, kind, nano)
        WHERE v.kind = 'held' OR v.kind = 'revenue' AND p_state = 'captured'
           OR v.kind = 'credit' AND (p_state <> 'captured' OR v.nano <> 0);
    UPDATE account a SET balance_nano_usd = a.balance_nano_usd
            + CASE a.kind WHEN 'held' THEN -held WHEN 'revenue' THEN p_captured ELSE held - p_captured END
        WHERE a.id IN (p_tenant || ':held:USD', p_tenant || ':revenue:USD', p_tenant || ':credit:USD');
    IF p_captured > 0 THEN
        INSERT INTO credit_use (transaction_id, credit_id, amount_nano_usd)
            VALUES (p_hold || ':settle', one.id, p_captured);
        UPDATE credit SET left_nano_usd = left_nano_usd - p_captured WHERE id = one.id;
    END IF;
    UPDATE budget_use u SET used_nano_usd = u.used_nano_usd + p_captured, held_nano_usd = u.held_nano_usd - held
        FROM budget b
        WHERE u.budget_id = b.id AND b.scope_id = ANY (scopes)
          AND u.period_start_ns = CASE b.period WHEN 'day' THEN p_day WHEN 'month' THEN p_month ELSE 0 END;
    INSERT INTO usage_record (request_id, tenant_id, project_id, key_id, model, num_prompt_tokens, num_cached_tokens,
                              num_completion_tokens, price_id, amount_nano_usd, started_ns, finished_ns, finish_reason,
                              stream, tier, num_tokens_before, engine_ns, block_ns, num_prefill_tokens,
                              num_recomputed_tokens, num_decode_steps)
        VALUES (p_request, p_tenant, p_project, p_key, p_model, p_prompt, p_cached, p_completion, p_price, p_captured,
                p_started, p_now, p_reason, p_stream, p_tier, 0, p_engine, p_blocks, p_prefill, p_recomputed, p_decode);
    RETURN true;
END $$
